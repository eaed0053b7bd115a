"""A filling disk pauses new tasks and nothing else. How full it is, is made up here; tests/faults fills a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flask.testing import FlaskClient
from structlog.testing import capture_logs

from common.broker import Broker
from common.cards import Health
from common.errors import StorageError, StorageFull
from common.settings import Settings
from common.storage.base import BaseStorage
from common.storage.local import Storage
from gateway import diskguard
from gateway.app import close, create_app
from gateway.diskguard import DiskGuard
from tests.unit.gateway.fake_worker import FakeWorker


class Disk(Storage):
    """A local storage on a disk that is as full as the test says, and counts how often it is asked."""

    share: float | None = 0.0
    error: Exception | None = None
    asked = 0

    def fullness(self) -> float | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.share


@pytest.fixture
def storage(settings: Settings) -> Disk:
    return Disk(settings)


@pytest.fixture
def filled(storage: Disk, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], str]:
    """Fill the disk to so many per cent, and return the guard's reason then."""
    monkeypatch.setattr(diskguard, "LOOK_EVERY_S", 0.0)
    guard = DiskGuard(storage, settings)

    def fill(percent: float | None) -> str:
        storage.share = None if percent is None else percent / 100
        return guard.reason()

    return fill


@pytest.fixture
def client(storage: Disk, settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    """A gateway over that disk."""

    def open_it(_: Settings) -> BaseStorage:
        return storage

    monkeypatch.setattr("gateway.app.open_storage", open_it)
    monkeypatch.setattr(diskguard, "LOOK_EVERY_S", 0.0)
    app = create_app(settings, broker)
    yield app.test_client()
    close(app)


def test_it_pauses_at_one_mark_and_resumes_below_another(filled: Callable[[float | None], str]) -> None:
    levels = (10, 89.9, 90, 95, 89, 85, 84.9, 86, 89.9, 90.1)
    with capture_logs() as logs:
        paused = [bool(filled(percent)) for percent in levels]
    assert paused == [False, False, True, True, True, True, False, False, False, True]
    assert [(line["event"], line["used_percent"]) for line in logs] == [
        ("storage_full", 90.0), ("storage_resumed", 84.9), ("storage_full", 90.1)
    ]  # fmt: skip
    assert "90.1% full" in filled(90.1) and "below 85%" in filled(90.1)


def test_it_warns_between_the_marks(storage: Disk, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskguard, "LOOK_EVERY_S", 0.0)
    guard = DiskGuard(storage, settings)
    told = []
    for percent in (84.9, 85, 89.9, 90, 86, 84.9):
        storage.share = percent / 100
        told.append(" ".join(guard.reasons()))
        assert bool(guard.reason()) == ("accepted again" in told[-1])
    assert [text.partition("; ")[2][:25] for text in told] == [
        "", "new tasks are refused fro", "new tasks are refused fro", "new tasks are accepted ag",
        "new tasks are accepted ag", "",
    ]  # fmt: skip
    assert told[1].startswith("the disk for results is 85% full; new tasks are refused from 90% on: free space")


def test_the_marks_are_settings(storage: Disk, settings: Settings) -> None:
    marks = {"disk_pause_percent": 50.0, "disk_resume_percent": 40.0}
    storage.share = 0.5
    with pytest.raises(StorageFull, match="50% full; new tasks are accepted again below 40%"):
        DiskGuard(storage, settings.model_copy(update=marks)).check()


def test_it_looks_once_a_second_at_most(storage: Disk, settings: Settings) -> None:
    guard = DiskGuard(storage, settings)
    for _ in range(100):
        guard.check()
    assert storage.asked == 1


def test_a_storage_without_a_disk_is_never_full(filled: Callable[[float | None], str]) -> None:
    assert filled(None) == ""


@pytest.mark.parametrize("error", [OSError("stale handle"), StorageError("cannot measure the disk")])
def test_a_disk_that_cannot_be_measured_refuses_nothing_and_is_told_once(
    filled: Callable[[float | None], str], storage: Disk, error: Exception
) -> None:
    assert filled(95)
    storage.error = error
    with capture_logs() as logs:
        assert [filled(95), filled(95)] == ["", ""]
    assert [line["event"] for line in logs] == ["disk_not_measured", "storage_resumed"]
    storage.error = None
    assert filled(95)


def test_new_tasks_are_refused_until_there_is_room(client: FlaskClient, storage: Disk, broker: Broker) -> None:
    storage.share = 0.93
    answer = client.post("/api/submit", json={"prompt": "x"})
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "storage_full")
    assert int(answer.headers["Retry-After"]) > 0
    assert "93% full" in answer.get_json(force=True)["detail"]
    assert client.post("/api/submit", json={"prompt": "x", "width": 1}).status_code == 422, "not worth repeating"
    assert broker.pending() == 0
    storage.share = 0.5
    assert client.post("/api/submit", json={"prompt": "x"}).status_code == 202


def test_what_was_accepted_before_is_found_again_under_its_key(client: FlaskClient, storage: Disk) -> None:
    def send(key: str) -> tuple[int, str]:
        answer = client.post("/api/submit", json={"prompt": "x"}, headers={"Idempotency-Key": key})
        body = answer.get_json(force=True)
        return answer.status_code, body.get("task_id") or body["code"]

    accepted = send("first")
    storage.share = 0.93
    assert send("first") == accepted
    assert send("second") == (503, "storage_full")


def test_health_and_readiness_say_so(client: FlaskClient, storage: Disk, worker: FakeWorker) -> None:
    client.post("/api/submit", json={"prompt": "x"})
    storage.share = 0.93
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, len(found.reasons), found.pending_tasks) == ("degraded", 2, 1)
    worker.beat()
    answer = client.get("/health")
    found = Health.model_validate_json(answer.data)
    assert (answer.status_code, found.status, found.workers) == (200, "degraded", 1)
    assert "93% full" in found.reasons[0]
    refused = client.get("/ready")
    assert (refused.status_code, refused.get_json(force=True)["code"]) == (503, "storage_full")
    storage.share = 0.87
    assert client.get("/ready").status_code == 503, "not below the lower mark yet"
    storage.share = 0.5
    assert Health.model_validate_json(client.get("/health").data).status == "healthy"
    storage.share = 0.87
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, client.get("/ready").status_code) == ("degraded", 200), "near full, and still accepting"
    assert client.get("/ready").status_code == 200


def test_accepted_tasks_go_on(client: FlaskClient, storage: Disk, broker: Broker) -> None:
    first, second = (client.post("/api/submit", json={"prompt": "x"}).get_json()["task_id"] for _ in range(2))
    storage.share = 0.93
    FakeWorker(broker, storage).work()
    assert client.get(f"/api/status/{first}").get_json()["status"] == "succeeded"
    assert client.get(f"/view/{first}/0.webp").status_code == 200
    assert client.post(f"/api/cancel/{second}").get_json()["status"] == "canceled"
