"""Storages that hang, as the gateway has them: at what point it waits no longer, and when it asks again."""

from __future__ import annotations

import contextlib
import threading

import pytest
from structlog.testing import capture_logs

from common.errors import NotStored, StorageError
from common.settings import Settings
from common.storage.base import Disk
from common.storage.local import Storage
from gateway import store as module
from gateway.store import Reach, Store
from tests.servers import eventually


class Hanging(Storage):
    """A storage that is as the test has it, and counts how often it is asked."""

    error: Exception | None = None
    asked = 0

    def read(self, key: str) -> bytes:
        self.asked += 1
        if self.error:
            raise self.error
        return super().read(key)


@pytest.fixture
def storage(settings: Settings) -> Hanging:
    storage = Hanging(settings)
    storage.put("a/0.png", b"x")
    return storage


def test_a_call_that_took_long_and_failed_spares_others_the_wait_for_a_while(
    storage: Hanging, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.0)
    kept, storage.error = Store(storage, settings), StorageError("read timed out")
    with pytest.raises(StorageError, match="timed out"):
        kept.read("a/0.png")
    for call in (lambda: kept.read("a/0.png"), lambda: kept.put("a/1.png", b"x"), kept.check):
        with pytest.raises(StorageError, match="does not answer"):
            call()
    assert storage.asked == 1
    storage.error, kept._silent_until = None, 0.0
    assert kept.read("a/0.png") == b"x"


@pytest.mark.parametrize("key", ["a/0.png", "a/none.png"])
def test_a_storage_that_answers_others_meanwhile_has_much_to_do_and_does_not_hang(
    storage: Hanging, settings: Settings, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.0)
    kept = Store(storage, settings)

    def late(_: str, data: bytes) -> None:
        with contextlib.suppress(NotStored):
            kept.read(key)
        raise StorageError("timed out")

    monkeypatch.setattr(storage, "put", late)
    with pytest.raises(StorageError, match="timed out"):
        kept.put("a/1.png", b"x")
    assert kept.read("a/0.png") == b"x"


@pytest.mark.parametrize("error", [NotStored("not there"), StorageError("refused")])
def test_an_error_that_comes_at_once_or_an_answer_that_is_no_does_not(
    storage: Hanging, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: StorageError
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.0 if isinstance(error, NotStored) else 60.0)
    kept, storage.error = Store(storage, settings), error
    for _ in range(2):
        with pytest.raises(type(error), match=error.message):
            kept.read("a/0.png")
    assert storage.asked == 2


def test_a_disk_that_is_read_only_is_told_of(storage: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    reach = Reach(storage)
    assert reach.reasons() == []
    monkeypatch.setattr(storage, "disk", lambda: Disk(1, 2, read_only=True))
    eventually(lambda: "mounted read-only" in " ".join(reach.reasons()))
    monkeypatch.undo()
    eventually(lambda: reach.reasons() == [])


def test_a_look_that_hangs_is_told_of_by_those_who_ask_meanwhile_and_is_forgotten_when_it_answers(
    storage: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW_S", 0.1)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(module, "MOMENT_S", 0.0)
    answers = threading.Event()
    monkeypatch.setattr(storage, "disk", answers.wait)
    reach = Reach(storage)
    with capture_logs() as logs:
        assert reach.reasons() == []
        eventually(lambda: "has not answered for" in " ".join(reach.reasons()))
        monkeypatch.setattr(storage, "disk", lambda: storage.head("a/1.png", 1))
        answers.set()
        eventually(lambda: "cannot be kept or fetched" in " ".join(reach.reasons()))
        monkeypatch.setattr(storage, "disk", lambda: None)
        eventually(lambda: reach.reasons() == [])
    assert [line["event"] for line in logs] == ["storage_away", "storage_back"]
