"""Keys as they are used: made on the command line, shown through Nginx and gunicorn, wanted where others can listen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from tests.integration.nginx_edge import Edge, nginx
from tests.integration.zfleet_command import ROOT, Up, environment, zfleet
from tests.servers import GatewayServer, RedisServer, Server, eventually, free_port
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker

LIMITS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
REFUSED = "zfleet: not listening on '0.0.0.0', which other machines reach, as this fleet has no API key yet"


@pytest.fixture
def edge(settings: Settings, tmp_path: Path) -> Iterator[Edge]:
    """Nginx in front of gunicorn."""
    with GatewayServer(settings, tmp_path / "gateway.out") as gateway, nginx(tmp_path / "edge", gateway.port) as edge:
        eventually(lambda: requests.get(f"{edge.url}/openapi.json", timeout=5).ok, within_s=30)
        yield edge


def made(redis_url: str, *flags: str) -> str:
    """A key by the command line."""
    done = zfleet("keys", "create", "--tenant", "acme", *flags, env=environment(redis_url=redis_url))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_key_through_nginx_and_gunicorn(edge: Edge, settings: Settings, broker: Broker, tmp_path: Path) -> None:
    key = made(settings.redis_url, "--rate", "5/h")
    url = f"{edge.url}/api/submit"
    eventually(lambda: requests.post(url, json={"prompt": "x"}).status_code == 401)
    unknown = requests.post(url, json={"prompt": "x"}, headers={"X-API-Key": key[:-1] + "g"})
    missing = requests.post(url, json={"prompt": "x"})
    assert unknown.content == missing.content
    assert missing.headers["WWW-Authenticate"] == unknown.headers["WWW-Authenticate"] == 'Bearer realm="zfleet"'
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: requests.post(url, json={"prompt": "x"}, headers=bearer(key)), range(20)))
    assert sorted(answer.status_code for answer in answers) == [202] * 5 + [429] * 15
    passed = [answer for answer in answers if answer.status_code == 202]
    assert sorted(answer.headers["X-RateLimit-Remaining"] for answer in passed) == list("01234")
    late = next(answer for answer in answers if answer.status_code == 429)
    assert [late.headers[name] for name in LIMITS] == ["5", "0", late.headers["X-RateLimit-Reset"]]
    assert late.json()["code"] == "rate_limited"
    assert 600 < int(late.headers["Retry-After"]) <= 720
    task_id = FakeWorker(broker, open_storage(settings)).work()
    picture = f"{edge.url}/view/{task_id}/0.webp"
    assert requests.get(picture, headers={"X-API-Key": key}).status_code == 200
    assert requests.get(picture).status_code == 401
    assert requests.get(picture, headers=bearer(new_key(broker, "other"))).status_code == 404
    zfleet("keys", "revoke", key.split("_")[1], env=environment(redis_url=settings.redis_url))
    eventually(lambda: requests.get(picture, headers=bearer(key)).status_code == 401, within_s=4.0)
    logs = [path for path in tmp_path.rglob("*") if path.suffix in (".out", ".log")]
    said = "".join(path.read_text("utf-8", "replace") for path in logs)
    assert task_id in said
    assert key.split("_")[2] not in said


def listens(port: int) -> list[str]:
    """The addresses at which somebody listens on this port."""
    found = (one for one in psutil.net_connections("tcp") if one.status == "LISTEN")
    return [one.laddr.ip for one in found if one.laddr.port == port]


def test_a_gateway_listens_beyond_this_machine_only_with_keys(
    settings: Settings, broker: Broker, redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    env = environment(redis_url=settings.redis_url, data_dir=tmp_path, models="simulated", port=port)
    command = ["gateway", "--host", "0.0.0.0"]
    refused = zfleet(*command, env=env)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(REFUSED)
    assert refused.stderr.count("\n") == 1
    bound = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gateway" / "gunicorn_conf.py"), "gateway.wsgi:app"]
    with Server([*bound, "--bind", f"0.0.0.0:{port}"], env=env, log=tmp_path / "bound") as server:
        assert server.process is not None
        assert server.process.wait(30) == 2
    new_key(broker)
    with Server([sys.executable, "-m", "zfleet", *command], env=env, log=tmp_path / "guarded"):
        eventually(lambda: "0.0.0.0" in listens(port), within_s=30)
        eventually(lambda: requests.get(f"http://127.0.0.1:{port}/api/queue", timeout=5).status_code == 401)
        redis_server.flush()
        assert not broker.guarded()
        assert requests.get(f"http://127.0.0.1:{port}/api/queue", timeout=5).status_code == 401


def test_unless_somebody_says_that_it_may(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    env = environment(redis_url=settings.redis_url, data_dir=tmp_path, models="simulated", port=port)
    command = [sys.executable, "-m", "zfleet", "gateway", "--host", "0.0.0.0", "--insecure"]
    with Server(command, env=env, log=tmp_path / "insecure"):
        eventually(lambda: "0.0.0.0" in listens(port), within_s=30)
        assert requests.get(f"http://127.0.0.1:{port}/api/workers", timeout=5).status_code == 200


def test_the_local_stack_keeps_to_this_as_well(tmp_path: Path) -> None:
    refused = zfleet("up", "--model", "simulated", "--host", "0.0.0.0", env=environment(data_dir=tmp_path / "data"))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(REFUSED)
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as server:
        key = made(server.url)
        with Up(tmp_path, "--host", "0.0.0.0", redis_url=server.url, api_key=key) as up:
            assert '-H "Authorization: Bearer $ZFLEET_API_KEY"' in up.said()
            env = environment(url=up.url, api_key=key, redis_url=server.url)
            out = tmp_path / "x.webp"
            done = zfleet("generate", "x", "-o", str(out), env=env)
            assert (done.returncode, out.is_file()) == (0, True), done.stderr
            done = zfleet("workers", env=env)
            assert (done.returncode, done.stderr) == (1, "zfleet: this call is for keys with the admin scope\n")
            done = zfleet("queue", env=env | {"ZFLEET_API_KEY": ""})
            assert done.returncode == 1
            assert "set ZFLEET_API_KEY" in done.stderr
            holders = [process for process in up.family() if key in str(process.environ()) + str(process.cmdline())]
            assert holders == [], "servers need no key, and others can read their environment"
            assert key not in "".join(path.read_text("utf-8", "replace") for path in tmp_path.rglob("*.log"))
