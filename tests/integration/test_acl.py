"""deploy/redis/users.acl on a real Redis: the whole fleet works with it, and none of its users can do more."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import requests
from redis.backoff import NoBackoff
from redis.retry import Retry

from common import keys
from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.records import Hold
from common.settings import Settings, child_environment, load_settings
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.integration.guarded_redis import NAMES, USERS, GuardedRedis
from tests.integration.hardened import answers
from tests.receivers import Receiver
from tests.servers import GatewayServer, Server, WorkerServer, binary, eventually, free_port
from tests.tenants import bearer, new_key, revoke
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    with GuardedRedis(tmp_path_factory.mktemp("guarded")) as server:
        yield server


def settings_of(guarded: GuardedRedis, user: str, folder: Path) -> Settings:
    return load_settings(
        {
            "redis_url": guarded.url_of(user),
            "data_dir": folder,
            "models": ("simulated",),
            "devices": "cpu",
            "simulated_image_ms": 500.0,
            "lease_s": 1.0,
            "beat_s": 0.25,
        }
    )


@pytest.fixture
def gateway_side(guarded: GuardedRedis, tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(settings_of(guarded, "gateway", tmp_path))
    yield broker
    broker.close()


@pytest.fixture
def worker_side(guarded: GuardedRedis, tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(settings_of(guarded, "worker", tmp_path))
    yield broker
    broker.close()


# ---- what works


def test_the_whole_fleet_works_as_these_users(guarded: GuardedRedis, gateway_side: Broker, tmp_path: Path) -> None:
    guarded.flush()
    with Receiver() as receiver:
        changed = {"webhook_allow": (receiver.netloc,)}
        gateways, workers, couriers, operators = (
            settings_of(guarded, user, tmp_path / "data").model_copy(update=changed)
            for user in ("gateway", "worker", "courier", "operator")
        )
        courier = [sys.executable, "-m", "gateway.webhooks"]
        with (
            WorkerServer(workers, tmp_path / "worker.log") as supervisor,
            GatewayServer(gateways, tmp_path / "log") as gateway,
            Server(courier, env=child_environment(couriers), log=tmp_path / "courier.log"),
        ):
            operator = Broker(operators)
            key = new_key(operator, rate="50/s", max_queued=20, max_running=1, admin=True)
            operator.close()
            guarded.client.acl_log_reset()
            eventually(lambda: answers(gateway.url), within_s=30)
            ready_workers(gateway_side)
            with requests.Session() as session:
                session.headers.update(bearer(key))
                _travel(session, gateway.url, receiver)
                _cancel_and_follow(session, gateway.url)
                _see(session, gateway.url)
                _operate(session, gateway.url)
                _restart(session, gateway.url, gateway_side)
            _crash(gateway_side, supervisor)
    assert guarded.refused() == []


def _travel(session: requests.Session, url: str, receiver: Receiver) -> None:
    """By the native dialect, told by webhook, and by OpenAI's, with a link that needs no key."""
    body = {"prompt": "x", "deadline_s": 60, "webhook": {"url": receiver.url, "events": ["started", "ended"]}}
    once = {"Idempotency-Key": "once"}
    first, again = (session.post(f"{url}/api/submit", json=body, headers=once, timeout=5).json() for _ in range(2))
    assert first["task_id"] == again["task_id"]
    seen = session.get(url + first["status_url"], params={"wait": 20}, timeout=30).json()
    assert seen["status"] == "succeeded"
    assert session.get(url + seen["images"][0]["url"], timeout=5).ok
    eventually(lambda: len(receiver.heard) >= 2)
    assert session.post(f"{url}/api/webhooks/secret/rotate", timeout=5).ok
    asked = {"prompt": "x", "size": "64x64", "response_format": "url"}
    made = session.post(f"{url}/v1/images/generations", json=asked, timeout=30)
    assert requests.get(made.json()["data"][0]["url"], timeout=5).ok


def _cancel_and_follow(session: requests.Session, url: str) -> None:
    """More at once than the key may run; a late one is refused."""
    late = {"prompt": "x", "n": 8, "deadline_s": 0.01, "reject_if_late": True}
    sent = [session.post(f"{url}/api/submit", json={"prompt": "x", "n": 8}, timeout=5).json() for _ in range(3)]
    assert session.post(f"{url}/api/submit", json=late, timeout=5).status_code == 503
    with session.get(url + sent[0]["events_url"], stream=True, timeout=20) as events:
        for one in reversed(sent):
            assert session.post(url + one["cancel_url"], timeout=5).ok
        assert b"event: canceled" in list(events.iter_lines())


def _see(session: requests.Session, url: str) -> None:
    for path in (
        "/health", "/ready", "/metrics", "/api/history", "/api/tasks", "/api/queue", "/api/workers", "/api/models",
        "/api/webhooks/secret", "/v1/models", "/api/fleet",
    ):  # fmt: skip
        answer = session.get(url + path, timeout=5)
        assert answer.ok, f"{path}: {answer.text}"


def _operate(session: requests.Session, url: str) -> None:
    def post(path: str, body: object = None) -> dict[str, Any]:
        answer = session.post(f"{url}/api/{path}", json=body, timeout=10)
        assert answer.ok, f"{path}: {answer.text}"
        return dict(answer.json())

    assert post("fleet/pause")["suspended"]
    assert not post("fleet/resume")["suspended"]
    worker = session.get(f"{url}/api/workers", timeout=5).json()["workers"][0]["name"]
    assert post(f"workers/{worker}/drain")["drained"]
    (late,) = [session.post(f"{url}/api/submit", json={"prompt": "x", "deadline_s": 0.01}, timeout=5).json()]
    eventually(lambda: session.get(url + late["status_url"], timeout=5).json()["status"] == "expired")
    assert post(f"tasks/{late['task_id']}/retry")["task_id"]
    assert not post("failed/requeue", {})["requeued"], "it has been done over"
    assert post("failed/purge", {})["purged"]
    assert not post(f"workers/{worker}/resume")["drained"]
    made = post("keys", {"tenant": "acme", "share": 2})
    made = post(f"keys/{made['key_id']}/rotate", {})
    assert post(f"keys/{made['key_id']}/revoke")["state"] == "revoked"
    assert session.get(f"{url}/api/keys", timeout=5).ok


def _restart(session: requests.Session, url: str, broker: Broker) -> None:
    (before,) = ready_workers(broker)
    assert session.post(f"{url}/api/workers/{before.name}/restart", timeout=5).ok
    eventually(lambda: before.name not in [card.name for card in ready_workers(broker)], within_s=30)


def _crash(broker: Broker, supervisor: WorkerServer) -> None:
    (task_id,) = submit_many(broker, 1, n=3, steps=50)
    await_running(broker, [task_id])
    (child,) = psutil.Process(supervisor.pid).children()
    child.kill()
    (task,) = await_final(broker, [task_id])
    assert [attempt.outcome for attempt in task.attempts] == ["crashed", "succeeded"]


def test_the_books_are_kept_as_these_users(guarded: GuardedRedis, gateway_side: Broker, worker_side: Broker) -> None:
    """What takes long to come about in a running fleet: each transition by itself."""
    guarded.flush()
    guarded.client.acl_log_reset()
    worker = FakeWorker(worker_side)
    lost, given_back, late, astray = (submit_many(gateway_side, 1)[0] for _ in range(4))
    for task in worker.take(2):
        if task.task_id == given_back:
            worker_side.release(worker.name, Hold(task.task_id, task.fence))
    eventually(lambda: lost in [reaped.task_id for reaped in worker_side.reap()], within_s=15, every_s=0.2)
    assert worker_side.traced(lost, 1) is None
    for task_id in (lost, given_back, late):
        assert gateway_side.cancel(task_id, None) == "canceled"
    guarded.client.delete("rq:queue:simulated.normal.default")
    eventually(lambda: (astray, "") in worker_side.reconcile(), within_s=15, every_s=0.2)
    assert gateway_side.cancel(astray, None) == "canceled"
    (expiring,) = submit_many(gateway_side, 1, deadline_s=0.05)
    eventually(lambda: (expiring, "") in worker_side.expire())
    assert record(gateway_side, expiring).status == "expired"
    assert len(gateway_side.shared_secret("signing")) == 32
    gateway_side.probe()
    assert guarded.refused() == []


def test_what_redis_forgot_is_told_again_as_these_users(tmp_path: Path) -> None:
    with GuardedRedis(tmp_path) as server:
        broker = Broker(settings_of(server, "gateway", tmp_path))
        (kept,) = submit_many(broker, 1)
        time.sleep(1.2)
        written = server.written()
        (task_id,) = submit_many(broker, 1)
        server.kill()
        server.forget(written)
        server.start()
        assert server.client.exists(f"zf:task:{kept}"), "what stands in its file is read whoever the default user is"
        assert record(broker, task_id).status == record(broker, kept).status == "queued"
        assert server.refused() == []
        broker.close()


def test_the_operator_makes_keys_and_steers_by_rqs_tools(
    guarded: GuardedRedis, gateway_side: Broker, tmp_path: Path
) -> None:
    guarded.flush()
    guarded.client.acl_log_reset()
    operator = Broker(settings_of(guarded, "operator", tmp_path))
    token = Token.new()
    key = ApiKey(key_id=token.key_id, tenant="acme", digest=token.digest, created_at=datetime.now(UTC))
    operator.put_key(key, share=2)
    assert operator.all_keys() == [key] and operator.shares() == {"acme": 2.0}
    assert gateway_side.key(token.key_id) == key and gateway_side.guarded()
    revoke(operator, str(token))
    operator.close()
    for arguments in (["info", "--serializer", "json"], ["suspend"], ["resume"]):
        command = [sys.executable, "-m", "rq.cli", *arguments, "--url", guarded.url_of("operator")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert guarded.refused() == []


# ---- what does not

FORBIDDEN = (
    "CONFIG GET *", "CONFIG SET dir /tmp", "CONFIG REWRITE", "FLUSHALL", "FLUSHDB", "KEYS *", "DEBUG SLEEP 0",
    "SHUTDOWN NOSAVE", "ACL LIST", "ACL SETUSER x on", "ACL WHOAMI", "MODULE LIST", "MODULE LOAD /tmp/x.so",
    "SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION LIST", "SAVE", "BGSAVE", "BGREWRITEAOF", "REPLICAOF 127.0.0.1 1",
    "MONITOR", "CLIENT LIST", "CLIENT KILL ID 1", "CLIENT PAUSE 1", "MIGRATE 127.0.0.1 1 zf:x 0 1",
    "RESTORE zf:x 0 x", "SWAPDB 0 1", "SORT zf:open", "SLOWLOG GET", "LATENCY DOCTOR", "CLUSTER INFO",
    "FAILOVER", "PSYNC ? -1", "GET other", "SET other 1", "SUBSCRIBE other", "PUBLISH other x",
)  # fmt: skip


@pytest.mark.parametrize("command", FORBIDDEN)
@pytest.mark.parametrize("user", NAMES)
def test_a_user_may_not(guarded: GuardedRedis, user: str, command: str) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=r"no permission|not allowed"):
        guarded.as_user(user).execute_command(*command.split(" "))


NOT_BY_WORKERS = (
    "HSET zf:key:a key x", "SADD zf:keys a", "HSET zf:shares a 9", "HGET zf:secrets a",
    "HSET zf:secrets a b", "HSET zf:idem:a id b", "SADD zf:drained a",
    "SET zf:restart:a 1", "SUBSCRIBE __keyspace@0__:x",
)  # fmt: skip
NOT_BY_GATEWAYS = ("SET zf:claim:a x", "DEL zf:dead:a", "GET zf:reaped")
NOT_BY_COURIERS = (
    "HSET zf:key:a key x", "DEL zf:keys", "SADD zf:keys a", "HSET zf:shares a 9", "SET zf:claim:a x",
    "SADD zf:drained a",
)  # fmt: skip


@pytest.mark.parametrize(
    ("user", "command"),
    [
        *(("worker", command) for command in NOT_BY_WORKERS),
        *(("gateway", command) for command in NOT_BY_GATEWAYS),
        *(("courier", command) for command in NOT_BY_COURIERS),
    ],
)
def test_each_keeps_to_its_part(guarded: GuardedRedis, user: str, command: str) -> None:
    """Workers and couriers make no keys and steer nothing; by a script no more than by themselves."""
    client = guarded.as_user(user)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split(" "))
    if not command.startswith("SUBSCRIBE"):
        call = ",".join(f"'{part}'" for part in command.split(" "))
        with pytest.raises(redis.exceptions.ResponseError, match=r"can't (run|access)"):
            client.eval(f"return redis.call({call})", 0)


@pytest.mark.parametrize(
    "call", ["'SET','other','1'", "'GET','other'", "'KEYS','*'", "'FLUSHALL'", "'CONFIG','GET','*'"]
)
@pytest.mark.parametrize("user", NAMES)
def test_a_script_may_no_more_than_its_user(guarded: GuardedRedis, user: str, call: str) -> None:
    """The scripts here name no keys in advance: Redis looks at every call that they make."""
    with pytest.raises(redis.exceptions.ResponseError):
        guarded.as_user(user).eval(f"return redis.call({call})", 0)
    assert guarded.client.get("other") is None


def test_nobody_is_let_in_without_a_password(guarded: GuardedRedis) -> None:
    once = Retry(NoBackoff(), 0)
    for user, password in ((None, None), ("worker", "x"), ("default", ""), ("nobody", "x")):
        client = redis.Redis(port=guarded.port, username=user, password=password, retry=once)
        with pytest.raises(redis.exceptions.AuthenticationError):
            client.ping()


def test_redis_does_not_start_while_a_password_is_missing(tmp_path: Path) -> None:
    command = [binary("redis-server"), "--port", str(free_port()), "--dir", str(tmp_path), "--aclfile", str(USERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0 and "hash must be exactly 64 characters" in done.stdout + done.stderr


def test_the_readmes_line_fills_the_passwords_in(tmp_path: Path) -> None:
    readme = USERS.with_name("README.md").read_text("utf-8")
    script = re.search(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert script is not None
    text = script[1].replace("/etc/redis/users.acl", str(tmp_path / "users.acl")).replace("-o redis -g redis ", "")
    done = subprocess.run(["bash", "-ec", text], cwd=USERS.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    filled = (tmp_path / "users.acl").read_text("utf-8")
    assert "PASSWORD" not in filled and len(re.findall(r"#[0-9a-f]{64} ", filled)) == len(NAMES)
    assert (tmp_path / "users.acl").stat().st_mode & 0o077 == 0
    shown = dict(line.split(": ") for line in done.stderr.strip().splitlines())
    assert shown.keys() == set(NAMES) and len(set(shown.values())) == len(NAMES)
    assert all(hashlib.sha256(password.encode()).hexdigest() in filled for password in shown.values())


def test_a_user_without_a_password_is_named() -> None:
    command = [sys.executable, str(USERS.with_name("users.py")), "--given"]
    given = "".join(f"{name.upper()}_PASSWORD={name}\n" for name in NAMES if name != "courier") + "COURIER_PASSWORD=\n"
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "there is no COURIER_PASSWORD" in done.stderr


CHANNELS = ("ENDS", "STEPS")
ONLY_READ = ("API_KEY", "API_KEYS", "SHARES")


def test_every_key_is_in_reach_of_who_needs_it(guarded: GuardedRedis) -> None:
    """A key that is new in common/keys.py has to be let through here, too, to somebody at least."""
    for name, key in vars(keys).items():
        if not (name.isupper() and str(key).startswith(("zf:", "rq:"))) or name in CHANNELS:
            continue
        full = key + "x" if key.endswith(":") else key
        command = "HGET" if name in ONLY_READ else "HSET"
        allowed = {user: _may(guarded, user, command, full) for user in ("gateway", "worker", "courier")}
        assert any(allowed.values()), f"{name}: {full} is in nobody's reach; see {USERS.name}"
        if name in ONLY_READ:
            assert not any(_may(guarded, user, "HSET", full) for user in ("worker", "courier")), name


def _may(guarded: GuardedRedis, user: str, command: str, key: str) -> bool:
    arguments = ("f", "v") if command == "HSET" else ("f",)
    return bool(guarded.client.execute_command("ACL", "DRYRUN", user, command, key, *arguments) == "OK")
