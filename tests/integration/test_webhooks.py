"""Webhooks from end to end: gateway, couriers and receivers that are real, and what each of them does badly."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from redis import Redis
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from common.broker import Broker
from common.outbox import TRIES
from common.schemas import Delivery
from common.settings import Settings, child_environment
from common.storage import open_storage
from gateway.app import close, create_app
from gateway.webhooks import courier as module
from gateway.webhooks import signing
from gateway.webhooks.courier import Courier
from gateway.webhooks.targets import Targets
from tests.fleet import await_final, ready_workers, record, submit_many
from tests.receivers import HOST, Handler, Receiver
from tests.servers import RedisServer, Server, WorkerServer, eventually
from tests.unit.gateway.fake_worker import FakeWorker

QUICK = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18)  # pauses, as many as there really are


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver(tmp_path) as receiver:
        monkeypatch.setenv("SSL_CERT_FILE", str(receiver.certificate))
        yield receiver


@pytest.fixture
def there(settings: Settings, receiver: Receiver) -> Settings:
    """Settings by which this one receiver on loopback is allowed."""
    return settings.model_copy(update={"webhook_allow": (receiver.netloc,), "models": ("simulated",)})


@pytest.fixture
def client(there: Settings, broker: Broker) -> Iterator[FlaskClient]:
    app = create_app(there, broker)
    yield app.test_client()
    close(app)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.03)


@contextmanager
def courier(settings: Settings, **options: object) -> Iterator[Courier]:
    """A courier of this process, at work."""
    options = {"pauses_s": QUICK, "targets": Targets(settings.webhook_allow)} | options
    broker = Broker(settings)
    one = Courier(broker, options.pop("targets"), **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield one
    finally:
        one.stop()
        thread.join()
        broker.close()


def finish(broker: Broker, count: int = 1) -> None:
    """Do so many tasks."""
    worker = FakeWorker(broker)
    for task in worker.take(count):
        worker.succeed(task)


def hooked(url: str, *events: str) -> dict[str, object]:
    return {"url": url, "events": list(events or ("ended",))}


def told(broker: Broker, receiver: Receiver, count: int = 1, **changes: object) -> list[str]:
    """Submit and end so many tasks that want to tell this receiver; return their ids."""
    ids = submit_many(broker, count, webhook=hooked(receiver.url), **changes)
    finish(broker, count)
    return ids


def delivery(broker: Broker, task_id: str) -> Delivery:
    (one,) = record(broker, task_id).deliveries
    return one


def settled(broker: Broker, task_id: str, within_s: float = 10.0) -> Delivery:
    eventually(lambda: delivery(broker, task_id).state != "pending", within_s=within_s)
    return delivery(broker, task_id)


def test_a_task_is_told_of_and_the_library_verifies_it(
    client: FlaskClient, broker: Broker, there: Settings, receiver: Receiver
) -> None:
    body = {"prompt": "a red circle", "webhook": hooked(receiver.url, "started", "ended")}
    task_id = client.post("/api/submit", json=body).json["task_id"]
    worker = FakeWorker(broker, open_storage(there))
    with courier(there):
        (task,) = worker.take()
        eventually(lambda: len(receiver.heard) == 1)
        worker.succeed(task)
        eventually(lambda: len(receiver.heard) == 2)
        eventually(lambda: {one.state for one in record(broker, task_id).deliveries} == {"delivered"})
    secret = client.get("/api/webhooks/secret").json["secret"]
    assert secret.startswith("whsec_")
    started, ended = (heard.verified(secret) for heard in receiver.heard)
    assert [message["type"] for message in (started, ended)] == ["task.started", "task.ended"]
    assert [heard.id for heard in receiver.heard] == [f"{task_id}-started-1", f"{task_id}-ended"]
    status = client.get(f"/api/status/{task_id}").json
    assert ended["data"] | {"webhook": None} == status | {"webhook": None}
    assert (started["timestamp"], ended["timestamp"]) == (status["started_at"], status["finished_at"])
    assert status["request"]["webhook"] == body["webhook"]
    assert status["webhook"]["url"] == receiver.url
    last = status["webhook"]["deliveries"][1]
    assert last.pop("last_try_at") >= status["finished_at"]
    assert last == {
        "id": f"{task_id}-ended", "event": "ended", "state": "delivered", "tries": 1, "last_status": 200,
        "last_error": None, "next_try_at": None,
    }  # fmt: skip
    headers = receiver.heard[1].headers
    assert (headers["content-type"], headers["user-agent"]) == ("application/json", "zfleet-webhooks/1.0")
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(receiver.heard[1].body.replace("red", "blue"), headers)


def test_a_task_without_a_webhook_says_so(client: FlaskClient) -> None:
    task_id = client.post("/api/submit", json={"prompt": "x"}).json["task_id"]
    status = client.get(f"/api/status/{task_id}").json
    assert status["webhook"] is None and status["request"]["webhook"] is None


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://u:p@h.example/",
    ],
    ids=range(4),
)
def test_a_target_inside_is_refused_with_the_field_and_the_remedy(client: FlaskClient, url: str) -> None:
    answer = client.post("/api/submit", json={"prompt": "x", "webhook": {"url": url}})
    assert answer.status_code == 422
    ((loc, msg),) = [(field["loc"], field["msg"]) for field in answer.json["errors"]]
    assert loc == "webhook.url" and msg.startswith("must be an https URL of a host that the whole world can reach")
    assert url not in answer.text


def test_a_rotated_secret_signs_beside_the_new_one(
    client: FlaskClient, broker: Broker, there: Settings, receiver: Receiver
) -> None:
    old = client.get("/api/webhooks/secret").json
    new = client.post("/api/webhooks/secret/rotate").json
    assert old["previous_until"] is None and new["previous_until"] is not None
    assert client.get("/api/webhooks/secret").json == new != old
    told(broker, receiver)
    with courier(there):
        eventually(lambda: receiver.heard)
    for secret in (old["secret"], new["secret"]):
        assert receiver.heard[0].verified(secret)["type"] == "task.ended"
    assert len(receiver.heard[0].headers["webhook-signature"].split()) == 2


def test_ten_tries_with_growing_pauses_and_the_last_ones_outcome(
    broker: Broker, there: Settings, receiver: Receiver
) -> None:
    receiver.behaviour = lambda handler: handler.answer(500)
    (task_id,) = told(broker, receiver)
    with courier(there, pauses_s=[pause * 3 for pause in QUICK]):
        last = settled(broker, task_id, within_s=20)
    assert (last.state, last.tries, last.last_status) == ("failed", 10, 500)
    assert last.last_error == "the receiver answered 500, which is no success"
    assert len(receiver.heard) == 10
    assert {heard.id for heard in receiver.heard} == {f"{task_id}-ended"}
    at = [heard.at for heard in receiver.heard]
    gaps = [after - before for before, after in itertools.pairwise(at)]
    assert all(gap >= pause * 3 * 0.9 - 0.01 for gap, pause in zip(gaps, QUICK, strict=True))
    assert sum(gaps) < sum(QUICK) * 3 * 2 + 1


def test_the_pauses_are_ten_tries_over_two_hours() -> None:
    assert len(module.PAUSES_S) == TRIES - 1, "leases that run out count as much"
    assert sum(module.PAUSES_S) == pytest.approx(7200, rel=0.02)
    assert list(module.PAUSES_S) == sorted(module.PAUSES_S)
    assert module.TRY_S < module.LEASE_S


def test_a_receiver_that_comes_back_is_told_under_the_same_id(
    broker: Broker, there: Settings, receiver: Receiver
) -> None:
    receiver.behaviour = lambda handler: handler.answer(500 if len(receiver.heard) < 3 else 204, b"")
    (task_id,) = told(broker, receiver)
    with courier(there):
        last = settled(broker, task_id)
    assert (last.state, last.tries, last.last_status, last.last_error) == ("delivered", 3, 204, None)
    assert len({heard.id for heard in receiver.heard}) == 1


def test_gone_ends_it_at_once_and_a_redirect_is_followed_nowhere(
    broker: Broker, there: Settings, receiver: Receiver
) -> None:
    receiver.behaviour = lambda handler: handler.answer(410)
    with courier(there, pauses_s=(0.02,)):
        (task_id,) = told(broker, receiver)
        assert (settled(broker, task_id).state, delivery(broker, task_id).tries) == ("failed", 1)
        receiver.behaviour = lambda handler: handler.answer(307, Location=f"https://{receiver.netloc}/inner")
        (task_id,) = told(broker, receiver)
        last = settled(broker, task_id)
    assert (last.state, last.tries, last.last_status) == ("failed", 2, 307)
    assert {heard.path for heard in receiver.heard} == {"/told?token=s3cret"}


def test_a_receiver_that_asks_for_time_gets_it(broker: Broker, there: Settings, receiver: Receiver) -> None:
    receiver.behaviour = lambda handler: handler.answer(503 if len(receiver.heard) < 2 else 200, Retry_After="1")
    (task_id,) = told(broker, receiver)
    with courier(there):
        assert settled(broker, task_id).state == "delivered"
    first, second = receiver.heard
    assert second.at - first.at >= 0.99
    assert second.headers["webhook-timestamp"] > first.headers["webhook-timestamp"], "each try is signed anew"
    secret = signing.shown(broker.webhook_secrets("default").current)
    assert first.verified(secret) and second.verified(secret)


def test_two_couriers_side_by_side_tell_everything_once(broker: Broker, there: Settings, receiver: Receiver) -> None:
    receiver.behaviour = lambda handler: (time.sleep(0.02), handler.answer())[1]
    with courier(there), courier(there):
        ids = told(broker, receiver, 40) + told(broker, receiver, 40)
        eventually(lambda: all(delivery(broker, task_id).state == "delivered" for task_id in ids), within_s=20)
    assert Counter(heard.id for heard in receiver.heard) == Counter(f"{task_id}-ended" for task_id in ids)
    assert {delivery(broker, task_id).tries for task_id in ids} == {1}


def test_a_receiver_that_hangs_holds_up_its_own_tenant_only(
    client: FlaskClient, broker: Broker, there: Settings, receiver: Receiver
) -> None:
    with Receiver() as other:
        settings = there.model_copy(update={"webhook_allow": (receiver.netloc, other.netloc)})
        receiver.behaviour = receiver.hang
        stuck = submit_many(broker, 20, webhook=hooked(receiver.url))
        finish(broker, 20)
        with courier(settings, most_of_tenant=3, try_s=30.0):
            eventually(lambda: len(receiver.heard) == 3)
            began = time.monotonic()
            ids = [_submit_as(broker, "other", other.url) for _ in range(10)]
            finish(broker, 10)
            eventually(lambda: len(other.heard) == 10)
            assert time.monotonic() - began < 15, "half of what a hanging try takes"
            assert {delivery(broker, task_id).state for task_id in ids} == {"delivered"}
            assert len(receiver.heard) == 3
            receiver.behaviour = Handler.answer
            receiver.released.set()
            for task_id in stuck:
                assert settled(broker, task_id).state == "delivered"


def _submit_as(broker: Broker, tenant: str, url: str) -> str:
    from common.records import NewTask
    from tests.conftest import resolved

    task = NewTask(task_id=f"{tenant}-{time.monotonic_ns()}", tenant=tenant, request=resolved(webhook=hooked(url)))
    return broker.submit(task).task_id


def test_a_name_server_that_changes_its_mind_opens_nothing(broker: Broker, there: Settings, receiver: Receiver) -> None:
    answers = iter([["127.0.0.1"], ["192.0.2.1", "127.0.0.1"], ["::ffff:127.0.0.1"]])
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return next(answers, ["127.0.0.1"])

    (task_id,) = submit_many(broker, 1, webhook=hooked(f"https://{HOST}:{receiver.port}/"))
    finish(broker)
    with courier(there, targets=Targets([], resolve), pauses_s=(0.01, 0.01)):
        last = settled(broker, task_id)
    assert (last.state, last.tries, last.last_status) == ("failed", 3, None)
    assert last.last_error == "its host name stands for an address that is not public"
    assert asked == [HOST] * 3
    assert receiver.heard == []


def test_the_connection_is_to_the_address_that_was_checked(broker: Broker, there: Settings, receiver: Receiver) -> None:
    """The system's own resolver knows nothing of this name, and ours would lead elsewhere if it were asked again."""
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    (task_id,) = submit_many(broker, 1, webhook=hooked(f"https://{HOST}:{receiver.port}/x"))
    finish(broker)
    with courier(there, targets=Targets([HOST], resolve)):
        assert settled(broker, task_id).state == "delivered"
    assert asked == [HOST]
    (heard,) = receiver.heard
    assert (heard.server_name, heard.headers["host"]) == (HOST, f"{HOST}:{receiver.port}")


def test_nothing_of_the_url_the_prompt_or_the_secret_is_logged(
    broker: Broker, there: Settings, receiver: Receiver
) -> None:
    with capture_logs() as logs, courier(there):
        (task_id,) = told(broker, receiver)
        settled(broker, task_id)
        receiver.behaviour = receiver.hang
        eventually(lambda: any(line["event"] == "webhook_tried" for line in logs))
    text = json.dumps(logs, default=repr)
    assert "webhook_tried" in text
    secret = broker.webhook_secrets("default").current
    for hidden in ("s3cret", "127.0.0.1", "red circle", secret.hex()):
        assert hidden not in text


def test_a_record_that_this_version_cannot_read_fails_and_is_not_repeated_in_a_log(
    broker: Broker, there: Settings, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    (task_id,) = told(broker, receiver)
    redis = Redis.from_url(there.redis_url)
    kept = redis.hget(f"zf:task:{task_id}", "request")
    redis.hset(f"zf:task:{task_id}", "request", '{"prompt": "a secret wish"}')
    with courier(there, pauses_s=(0.01,)):
        eventually(lambda: redis.zcard("rq:failed:webhooks.default") == 1)
    redis.hset(f"zf:task:{task_id}", "request", kept)
    last = delivery(broker, task_id)
    assert (last.state, last.tries) == ("failed", 2)
    said = capfd.readouterr()
    assert "webhook_broke" in said.out and "secret wish" not in said.out + said.err


def test_redis_may_go_and_come_back(settings: Settings, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as server:
        there = settings.model_copy(update={"redis_url": server.url, "webhook_allow": (receiver.netloc,)})
        broker = Broker(there, patience_s=20)
        with courier(there):
            first = told(broker, receiver)
            settled(broker, first[0])
            server.kill()
            time.sleep(0.3)
            server.start()
            second = told(broker, receiver)
            assert settled(broker, second[0]).state == "delivered"
        broker.close()


def process(settings: Settings, log: Path, program: str = "") -> Server:
    command = ["-c", program] if program else ["-m", "gateway.webhooks"]
    return Server([sys.executable, *command], env=child_environment(settings), log=log)


def logged(log: Path, event: str) -> bool:
    return event in log.read_text() if log.exists() else False


def test_sigterm_gives_back_what_hangs_and_ends_cleanly(
    broker: Broker, there: Settings, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.behaviour = receiver.hang
    (task_id,) = told(broker, receiver)
    one = process(there, tmp_path / "log").start()
    eventually(lambda: receiver.heard, within_s=30)
    began = time.monotonic()
    assert one.stop(timeout_s=8) == 0
    assert time.monotonic() - began < 6
    back = delivery(broker, task_id)
    assert (back.state, back.tries) == ("pending", 0)
    assert logged(tmp_path / "log", "courier_stopped")
    assert "s3cret" not in (tmp_path / "log").read_text()
    receiver.behaviour = Handler.answer
    with courier(there):
        assert settled(broker, task_id).tries == 1
    assert len({heard.id for heard in receiver.heard}) == 1


SHORT_LEASE = """
from common.broker import Broker
from common.settings import load_settings
from gateway.webhooks.courier import Courier
from gateway.webhooks.targets import Targets
settings = load_settings()
Courier(Broker(settings), Targets(settings.webhook_allow), lease_s=1.0).run()
"""


def test_what_a_killed_courier_had_under_way_is_told_by_another(
    broker: Broker, there: Settings, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.behaviour = receiver.hang
    ids = told(broker, receiver, 3)
    one = process(there, tmp_path / "log", SHORT_LEASE).start()
    eventually(lambda: len(receiver.heard) == 3, within_s=30)
    one.kill()
    receiver.behaviour = Handler.answer
    with courier(there):
        for task_id in ids:
            last = settled(broker, task_id)
            assert (last.state, last.tries) == ("delivered", 2)
    assert Counter(heard.id for heard in receiver.heard) == Counter({f"{task_id}-ended": 2 for task_id in ids})


def test_a_wrong_allow_list_is_told_in_one_line(there: Settings, tmp_path: Path) -> None:
    one = process(there.model_copy(update={"webhook_allow": ("http://x",)}), tmp_path / "log").start()
    assert one.process is not None
    assert one.process.wait(30) == 2
    assert (tmp_path / "log").read_text().startswith("zfleet: ZFLEET_WEBHOOK_ALLOW: 'http://x' is no host")


def test_a_slow_receiver_slows_no_gpu(broker: Broker, there: Settings, receiver: Receiver, tmp_path: Path) -> None:
    """Ten tasks take a worker as long with a receiver that hangs as with none."""

    def seconds(**changes: object) -> float:
        ids = submit_many(broker, 10, **changes)
        tasks = await_final(broker, ids)
        began = min(task.started_at.timestamp() for task in tasks if task.started_at)
        return max(task.finished_at.timestamp() for task in tasks if task.finished_at) - began

    receiver.behaviour = receiver.hang
    with WorkerServer(there, tmp_path / "log"), courier(there, try_s=20.0):
        ready_workers(broker)
        seconds()
        without = seconds()
        with_hanging = seconds(webhook=hooked(receiver.url, "started", "ended"))
        assert receiver.heard, "nothing hung"
        assert with_hanging < without * 2 + 1.0
