"""From pixels to a visible result, with a real Redis and real files."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from common.broker import Broker
from common.errors import StorageError, StorageFull
from common.schemas import TaskStatus
from common.settings import Settings
from common.storage import open_storage
from common.storage.local import Storage
from tests.conftest import SubmitFn
from tests.servers import eventually
from worker import commit as module
from worker.commit import STORE_TRIES, Committer
from worker.encoding import encode
from worker.heartbeat import Heartbeat
from worker.held import HeldTask

PIXELS = np.zeros((64, 64, 3), np.uint8)


class Filling(Storage):
    """A disk that has room for so many writes, and notes when each was tried."""

    def __init__(self, settings: Settings, room: int) -> None:
        super().__init__(settings)
        self.room = room
        self.tried: list[float] = []

    def put(self, key: str, data: bytes) -> None:
        self.tried.append(time.monotonic())
        if self.room == 0:
            raise StorageFull("no space left")
        self.room -= 1
        super().put(key, data)


def files(settings: Settings) -> list[str]:
    return [path.name for path in settings.results_dir.rglob("*") if path.is_file()]


def held(broker: Broker, worker: str = "w1") -> HeldTask:
    (claimed,) = broker.claim(worker, "cpu", ["simulated"], 9).tasks
    task = HeldTask(claimed=claimed, deadline=None, outcome="succeeded")
    task.pixels = {k: PIXELS.copy() for k in range(claimed.request.n)}
    return task


def commit(broker: Broker, settings: Settings, task: HeldTask, worker: str = "w1") -> None:
    committer = Committer(worker, broker, open_storage(settings), committed=lambda _: None)
    committer.commit(task)
    committer.close()


def test_a_success_is_stored_then_told(broker: Broker, settings: Settings, submit: SubmitFn) -> None:
    task_id = submit(n=2, format="webp", seed=7)
    commit(broker, settings, held(broker))
    record = broker.view(task_id)
    assert record is not None
    assert record.status is TaskStatus.SUCCEEDED
    assert [image.seed for image in record.images] == [7, 8]
    for image in record.images:
        data = open_storage(settings).read(image.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (image.bytes, image.sha256)
        assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_two_workers_write_two_files_for_one_task(broker: Broker, settings: Settings, submit: SubmitFn) -> None:
    task_id = submit()
    old = held(broker, "w1")
    broker.reap("w1")
    new = held(broker, "w2")
    commit(broker, settings, new, "w2")
    commit(broker, settings, old, "w1")
    assert old.outcome == "lost"
    record = broker.view(task_id)
    assert record is not None
    kept = [path for path in settings.results_dir.rglob("*") if path.is_file()]
    assert kept == [settings.results_dir / record.images[0].key]
    assert "/w2/" in record.images[0].key


def test_a_worker_that_lost_a_task_and_got_it_again_keeps_the_second_result(
    broker: Broker, settings: Settings, submit: SubmitFn
) -> None:
    task_id = submit()
    old = held(broker)
    broker.release("w1", old.hold)
    new = held(broker)
    commit(broker, settings, new)
    commit(broker, settings, old)
    assert (old.outcome, new.outcome) == ("lost", "succeeded")
    record = broker.view(task_id)
    assert record is not None
    assert len(open_storage(settings).read(record.images[0].key)) == record.images[0].bytes
    assert len(files(settings)) == 1


def test_the_supervisor_can_see_what_is_being_stored(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a picture whose encoding takes the process down is a suspect."""
    submit()
    task, heartbeat, storage = held(broker), Heartbeat(), open_storage(settings)
    put, seen = storage.put, []

    def watch(key: str, data: bytes) -> None:
        seen.append(heartbeat.read().in_store)
        put(key, data)

    monkeypatch.setattr(storage, "put", watch)
    committer = Committer("w1", broker, storage, committed=lambda _: None, heartbeat=heartbeat)
    committer.commit(task)
    committer.close()
    assert seen == [[task.in_hand]]
    assert heartbeat.read().in_store == []


@pytest.mark.parametrize(
    ("outcome", "status"), [("canceled", "canceled"), ("failed", "failed"), ("released", "queued")]
)
def test_other_outcomes_store_nothing(
    broker: Broker, settings: Settings, submit: SubmitFn, outcome: str, status: str
) -> None:
    task_id = submit()
    task = held(broker)
    task.outcome = outcome  # type: ignore[assignment]
    commit(broker, settings, task)
    record = broker.view(task_id)
    assert record is not None
    assert (record.status, record.images) == (status, [])
    assert not list(settings.results_dir.rglob("*.png"))


def test_a_storage_that_fails_for_good_fails_the_task_with_its_reason(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.commit.OUTAGE_S", 0.0)
    settings.results_dir.parent.mkdir(parents=True)
    settings.results_dir.write_text("in the way")
    task_id = submit()
    commit(broker, settings, held(broker))
    record = broker.view(task_id)
    assert record is not None
    assert record.error is not None
    assert (record.error.code, record.error.retryable) == ("storage_error", True)


def test_a_storage_that_is_away_for_a_while_is_tried_again(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.commit.STORE_WAIT_S", 0.0)
    store = open_storage(settings)
    put, failures = store.put, iter([StorageError("away")] * 8)

    def flaky(key: str, data: bytes) -> None:
        for failure in failures:
            raise failure
        put(key, data)

    monkeypatch.setattr(store, "put", flaky)
    task_id = submit()
    committer = Committer("w1", broker, store, committed=lambda _: None)
    committer.commit(held(broker))
    committer.close()
    assert broker.view(task_id).status is TaskStatus.SUCCEEDED  # type: ignore[union-attr]


def test_a_disk_that_fills_up_leaves_none_of_the_pictures(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_WAIT_S", 0.02)
    store = Filling(settings, room=2)
    task_id = submit(n=3)
    committer = Committer("w1", broker, store, committed=lambda _: None)
    committer.commit(held(broker))
    committer.close()
    record = broker.view(task_id)
    assert record is not None and record.error is not None
    assert (record.status, record.error.code, record.images) == (TaskStatus.FAILED, "storage_full", [])
    assert (record.error.message, record.error.retryable) == ("no space left", True)
    assert files(settings) == []
    tries = store.tried[2:]
    assert len(tries) == STORE_TRIES
    waits = [later - earlier for earlier, later in pairwise(tries)]
    assert all(wait >= 0.02 * 2**k for k, wait in enumerate(waits)), "the waits grow"


def test_a_drain_does_not_wait_for_a_disk_and_gives_the_task_back(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_WAIT_S", 60.0)
    store = Filling(settings, room=0)
    task_ids = [submit() for _ in range(5)]
    committer = Committer("w1", broker, store, committed=lambda _: None)
    for claimed in broker.claim("w1", "cpu", ["simulated"], 9).tasks:
        task = HeldTask(claimed=claimed, deadline=None, outcome="succeeded")
        task.pixels = {0: PIXELS.copy()}
        committer.commit(task)
    eventually(lambda: len(store.tried) == 2)  # each thread has one in hand, the others stand behind them
    began = time.monotonic()
    committer.close(abandon_after_s=0.3)
    assert 0.25 < time.monotonic() - began < 2
    records = [broker.view(task_id) for task_id in task_ids]
    assert {record.status for record in records if record} == {TaskStatus.QUEUED}
    assert {attempt.outcome for record in records if record for attempt in record.attempts} == {"released"}


def test_a_drain_that_has_time_lets_a_task_have_its_tries(
    broker: Broker, settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_WAIT_S", 0.05)
    store = Filling(settings, room=0)
    task_id = submit()
    committer = Committer("w1", broker, store, committed=lambda _: None)
    committer.commit(held(broker))
    eventually(lambda: store.tried)
    store.room = 1
    committer.close(abandon_after_s=10)
    assert broker.view(task_id).status is TaskStatus.SUCCEEDED  # type: ignore[union-attr]


def test_commit_returns_at_once_and_says_when_it_is_through(
    broker: Broker, settings: Settings, submit: SubmitFn
) -> None:
    submit()
    through = threading.Event()
    committer = Committer("w1", broker, open_storage(settings), committed=lambda _: through.set())
    committer.commit(held(broker))
    assert through.wait(5)
    committer.close()


@pytest.mark.parametrize("image_format", ["webp", "png", "jpeg"])
def test_encoding_keeps_the_picture(image_format: str) -> None:
    y, x = np.mgrid[0:48, 0:80]
    pixels = np.stack([x * 3, y * 5, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    image = Image.open(io.BytesIO(encode(pixels, image_format, 85)))  # type: ignore[arg-type]
    assert (image.format or "").lower() == image_format
    assert image.size == (80, 48)
    difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels)
    assert difference.mean() < (0.01 if image_format == "png" else 6)


def test_a_higher_quality_makes_a_larger_file() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for image_format in ("webp", "jpeg"):
        assert len(encode(pixels, image_format, 95)) > len(encode(pixels, image_format, 40))  # type: ignore[arg-type]
