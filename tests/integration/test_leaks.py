"""What a client sends is nowhere but in its task's record: a whole fleet runs, and all that it leaves is searched."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import redis
import requests

from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.settings import load_settings
from tests.fleet import ready_workers
from tests.integration.hardened import Front, front
from tests.samples import encoded
from tests.servers import RedisServer, WorkerServer

MARK = "xq7leak"  # in all that is marked, and in nothing else
PROMPT, NEGATIVE, NOTE, ONCE = (f"{MARK}-{what}" for what in ("prompt", "negative", "note", "once"))


class Fleet(NamedTuple):
    """A fleet behind Nginx that wants keys, and the key to it."""

    front: Front
    redis: RedisServer
    token: Token
    folder: Path
    processes: list[psutil.Process]

    @property
    def secrets(self) -> list[bytes]:
        """What must be nowhere: the marked text, and both parts of the key that prove it."""
        return [MARK.encode(), self.token.secret.encode(), str(self.token).encode(), self.token.secret[:32].encode()]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("leaks")
    (folder / "logs").mkdir()
    with RedisServer(folder, "--logfile", str(folder / "logs" / "redis.log"), "--loglevel", "verbose") as server:
        settings = load_settings(
            {
                "redis_url": server.url, "data_dir": folder / "data", "models": ("simulated",), "devices": "cpu",
                "log_dir": folder / "logs", "log_level": "debug", "simulated_image_ms": 40.0,
            }
        )  # fmt: skip
        broker, token = Broker(settings), Token.new()
        broker.put_key(
            ApiKey(key_id=token.key_id, tenant="acme", digest=token.digest, admin=True, created_at=datetime.now(UTC))
        )
        with (
            WorkerServer(settings, folder / "logs" / "worker.out") as workers,
            front(settings, folder / "logs") as running,
        ):
            ready_workers(broker)
            family = [psutil.Process(one.pid) for one in (workers, running.gateway, server)]
            family += [child for one in list(family) for child in one.children(recursive=True)]
            family += [one for one in psutil.process_iter() if _serves(one, running.edge.run)]
            yield Fleet(running, server, token, folder, family)
        broker.close()


def _serves(process: psutil.Process, run: Path) -> bool:
    try:
        return "nginx" in process.name() and str(run) in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _talk(fleet: Fleet, url: str) -> None:
    """Everything that goes well, and all that can go wrong, with the mark and the key in each."""
    keyed = {"Authorization": f"Bearer {fleet.token}", "Idempotency-Key": ONCE, "Referer": f"http://x/?{MARK}"}
    body = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "metadata": {NOTE: NOTE}, "preview": True}
    sent = requests.post(f"{url}/api/submit", json=body, headers=keyed, timeout=10)
    assert sent.status_code == 202, sent.text
    status = sent.json()["status_url"]
    seen = requests.get(f"{url}{status}?wait=20&k={fleet.token}", headers={"X-API-Key": str(fleet.token)}, timeout=30)
    assert (seen.json()["status"], seen.json()["request"]["prompt"]) == ("succeeded", PROMPT)
    list(requests.get(url + sent.json()["events_url"], headers=keyed, timeout=20).iter_lines())
    image = seen.json()["images"][0]["url"]
    for path in ("/api/tasks", "/api/queue", "/api/workers", "/metrics", "/health", "/ready", image):
        requests.get(f"{url}{path}", headers=keyed, timeout=10)
    refused = [
        requests.post(f"{url}/api/submit", json=body | {"prompt": NOTE}, headers=keyed, timeout=10),  # 409
        requests.post(f"{url}/api/submit", json=body, timeout=10),  # 401
        requests.post(f"{url}/api/submit", json=body, headers={"X-API-Key": f"{fleet.token}0"}, timeout=10),
        requests.post(f"{url}/api/submit", json=body | {MARK: MARK, "model": MARK}, headers=keyed, timeout=10),
        requests.post(f"{url}/api/submit", json=body | {"init_image": MARK}, headers=keyed, timeout=10),
        requests.post(f"{url}/api/submit", f'{{"prompt": "{MARK}', headers=keyed, timeout=10),
        requests.post(f"{url}/api/submit", MARK, headers=keyed | {"Content-Type": f"text/{MARK}"}, timeout=10),
        requests.post(f"{url}/api/images", encoded() + MARK.encode(), headers=keyed, timeout=10),
        requests.get(f"{url}/api/status/{fleet.token}", headers=keyed, timeout=10),
        requests.get(f"{url}/api/tasks?cursor={MARK}&status={fleet.token}", headers=keyed, timeout=10),
        requests.get(f"{url}/nowhere?key={fleet.token}&prompt={MARK}", headers=keyed, timeout=10),
        requests.get(f"{url}/health", headers={"X-A": MARK * 2000}, timeout=10),
        requests.get(f"{url}/health?{MARK * 2000}", timeout=10),
        requests.request("BREW", f"{url}/api/submit?{fleet.token}", json=body, headers=keyed, timeout=10),
    ]
    assert [answer.status_code for answer in refused[:3]] == [409, 401, 401]
    assert all(500 > answer.status_code >= 400 for answer in refused if "/api/images" not in answer.url)
    for answer in refused[1:3]:
        assert fleet.token.secret not in answer.text


def _stammer(fleet: Fleet, port: int) -> None:
    """What no client library would send."""
    for data in (
        f"GET /x?{MARK} HTTP/1.1\r\nAuthorization {fleet.token}\r\n\r\n",
        f"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {fleet.token}\r\n"
        f"Transfer-Encoding: chunked\r\n\r\nzz\r\n{MARK}",
        f"{MARK}\r\n\r\n",
        f"POST /api/submit?{MARK} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n{MARK}",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
            sock.sendall(data.encode())
            try:
                while sock.recv(65536):
                    pass
            except OSError:
                pass


def test_nothing_that_a_client_sends_is_left_anywhere(fleet: Fleet) -> None:
    for one in (fleet.front.edge, fleet.front.gateway):
        fleet.redis.client.delete(*fleet.redis.client.keys("zf:idem:*") or ["none"])
        _talk(fleet, one.url)
        _stammer(fleet, one.port)
    time.sleep(0.5)
    logs = [path for path in (fleet.folder / "logs").rglob("*") if path.is_file() and path.suffix in (".log", ".out")]
    assert {path.name for path in logs} >= {"redis.log", "worker.out", "gateway.log", "access.log", "error.log"}
    assert any(path.name.startswith("worker-") and path.stat().st_size for path in logs)
    found = {path.name: [word for word in fleet.secrets if word in path.read_bytes()] for path in logs}
    assert not any(found.values()), found


def test_rq_sees_ids_alone(fleet: Fleet) -> None:
    _talk(fleet, fleet.front.gateway.url)
    client = redis.Redis(port=fleet.redis.port)
    names = client.keys("rq:*")
    assert len(names) > 5
    for name in names:
        held = client.dump(name) or b""
        texts = [name, held, repr(client.hgetall(name)).encode() if client.type(name) == b"hash" else b""]
        assert not [word for word in fleet.secrets for text in texts if word in text], name


def test_the_key_is_nowhere_on_redis(fleet: Fleet) -> None:
    _talk(fleet, fleet.front.gateway.url)
    client = redis.Redis(port=fleet.redis.port)
    for name in client.keys("*"):
        kind, read = client.type(name), {b"hash": client.hgetall, b"string": client.get}
        text = repr(read[kind](name)) if kind in read else repr(client.dump(name))
        assert fleet.token.secret not in text and fleet.token.secret not in name.decode()


def test_metrics_and_the_fleets_views_name_no_prompt(fleet: Fleet) -> None:
    _talk(fleet, fleet.front.gateway.url)
    for path in ("/metrics", "/health", "/api/history", "/api/queue", "/api/workers", "/api/models", "/api/fleet"):
        answer = requests.get(
            f"{fleet.front.gateway.url}{path}", headers={"Authorization": f"Bearer {fleet.token}"}, timeout=5
        )
        assert not [word for word in fleet.secrets if word in answer.content], path


def test_no_command_line_shows_anything(fleet: Fleet) -> None:
    assert len(fleet.processes) >= 6, "supervisor, worker, gunicorn and its child, Redis, Nginx"
    lines = [" ".join(process.cmdline()) for process in fleet.processes if process.is_running()]
    assert not [word for word in fleet.secrets for line in lines if word.decode() in line]
    assert not [line for line in lines if json.dumps(PROMPT) in line]
