"""One suite over every storage: what a worker writes, the gateway reads whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from common import registry, storage
from common.errors import ConfigurationError, StorageError, StorageFull
from common.settings import Settings, load_settings
from common.storage.base import STRAY_S, BaseStorage, attempt_folder, discard_attempt

LOCAL_ONLY = ("local",)  # a kind that needs a server brings its own fixture


@pytest.fixture(params=[name for name in registry.discover(storage) if name in LOCAL_ONLY])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    return load_settings({"storage": request.param, "data_dir": tmp_path / "a b"})


@pytest.fixture
def store(settings: Settings) -> BaseStorage:
    return storage.open_storage(settings)


def test_what_is_put_is_read(store: BaseStorage) -> None:
    store.put("20260131/w-1.cpu0/abc/0.webp", b"one")
    assert store.read("20260131/w-1.cpu0/abc/0.webp") == b"one"
    store.put("20260131/w-1.cpu0/abc/0.webp", b"two")
    assert store.read("20260131/w-1.cpu0/abc/0.webp") == b"two"


def test_what_is_not_there_is_a_storage_error(store: BaseStorage) -> None:
    with pytest.raises(StorageError):
        store.read("nothing/0.webp")
    store.delete("nothing/0.webp")


def test_deleted_is_gone(store: BaseStorage) -> None:
    store.put("a/0.png", b"x")
    store.delete("a/0.png")
    with pytest.raises(StorageError):
        store.read("a/0.png")


def test_whether_it_is_there_can_be_asked(store: BaseStorage) -> None:
    store.put("inputs/a.png", b"one two")
    assert store.exists("inputs/a.png")
    assert not store.exists("inputs/b.png")
    assert not store.exists("inputs")
    store.delete("inputs/a.png")
    store.put("b.png", b"x")  # so that the storage itself is there
    assert not store.exists("inputs/a.png")


def test_the_first_bytes_can_be_read_alone(store: BaseStorage) -> None:
    store.put("a/0.png", b"one two")
    assert (store.head("a/0.png", 3), store.head("a/0.png", 100)) == (b"one", b"one two")
    with pytest.raises(StorageError):
        store.head("a/1.png", 3)


def test_what_is_touched_counts_as_new(store: BaseStorage) -> None:
    store.put("a/0.png", b"x")
    file_of(store, "a/0.png", age_s=1000)
    store.touch("a/0.png")
    assert store.sweep(500) == 0
    assert store.read("a/0.png") == b"x"
    with pytest.raises(StorageError):
        store.touch("a/1.png")


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".hidden", "a/..", "a\x00b", "a\\b"])
def test_a_key_never_leaves_the_storage(store: BaseStorage, key: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: store.put(key, b"x"), lambda: store.read(key), lambda: store.delete(key), lambda: store.remove(key),
        lambda: store.exists(key), lambda: store.head(key, 1), lambda: store.touch(key),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(StorageError):
            call()


def file_of(store: BaseStorage, key: str, *, age_s: float = 0.0, data: bytes | None = None) -> Path:
    """The file of a key, written here with `data` if there is any, and made to look so old."""
    path = store.path(key)
    assert path is not None
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_sweep_removes_the_old_and_keeps_the_new(store: BaseStorage) -> None:
    store.put("old/0.png", b"x")
    store.put("new/0.png", b"x")
    path = file_of(store, "old/0.png", age_s=1000)
    file_of(store, "new/0.png", age_s=300)
    assert store.sweep(500) == 1
    assert store.read("new/0.png") == b"x"
    assert not path.exists()
    os.utime(path.parent, (time.time() - STRAY_S - 1,) * 2)
    assert store.sweep(500) == 0
    assert not path.parent.exists(), "a folder that has long been empty stays"


@pytest.mark.parametrize("retention_s", [1.0, 7 * 86_400.0])
def test_a_broken_write_goes_after_ten_minutes_and_a_live_one_never(store: BaseStorage, retention_s: float) -> None:
    broken = file_of(store, "a/1.png.77.partial", age_s=STRAY_S + 5, data=b"half")
    live = file_of(store, "a/2.png.78.partial", age_s=STRAY_S - 60, data=b"half")
    assert store.sweep(retention_s) == 1
    assert (broken.exists(), live.exists()) == (False, True)


def test_a_sweep_harms_no_write_beside_it(store: BaseStorage) -> None:
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            store.sweep(1000)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for k in range(100):
            store.put(f"20260131/w1/{k}/0.png", b"x" * 10_000)
    finally:
        stop.set()
        sweeper.join()
    assert {len(store.read(f"20260131/w1/{k}/0.png")) for k in range(100)} == {10_000}


def test_a_folder_is_removed_with_all_that_is_in_it_and_nothing_beside(store: BaseStorage) -> None:
    for key in ("20260131/w1/abc/0.png", "20260131/w1/abc/1.png", "20260131/w1/abcd/0.png", "20260131/w2/abc/0.png"):
        store.put(key, b"x")
    stray = file_of(store, "20260131/w1/abc/2.png.77.partial", data=b"half")
    store.remove("20260131/w1/abc")
    store.remove("20260131/w1/abc")
    for key in ("20260131/w1/abc/0.png", "20260131/w1/abc/1.png"):
        with pytest.raises(StorageError):
            store.read(key)
    assert not stray.exists()
    assert store.read("20260131/w1/abcd/0.png") == store.read("20260131/w2/abc/0.png") == b"x"


def test_a_dead_workers_attempt_leaves_nothing_whichever_day_it_began(store: BaseStorage) -> None:
    assert attempt_folder("w1", "abc", 2, date(2026, 1, 31)) == "20260131/w1/abc/2"
    today = datetime.now(UTC).date()
    mine = [attempt_folder("w1", "abc", 1, day) for day in (today, today - timedelta(days=1))]
    others = [attempt_folder(*attempt, today) for attempt in (("w2", "abc", 1), ("w1", "other", 1), ("w1", "abc", 2))]
    for folder in mine + others:
        store.put(f"{folder}/0.png", b"x")
    discard_attempt(store, "w1", "abc", 1)
    for folder in mine:
        with pytest.raises(StorageError):
            store.read(f"{folder}/0.png")
    assert [store.read(f"{folder}/0.png") for folder in others] == [b"x"] * 3


def test_how_full_it_is(store: BaseStorage, settings: Settings) -> None:
    before = store.fullness()
    assert before is None or 0.0 <= before <= 1.0
    store.put("a/0.png", b"x")
    after = store.fullness()
    if before is not None and after is not None:
        assert after == pytest.approx(before, abs=0.05)


def test_a_disk_that_cannot_be_measured_is_a_storage_error(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    nowhere = settings.model_copy(update={"data_dir": settings.data_dir / ("x" * 300)})
    with pytest.raises(StorageError, match="cannot measure"):
        storage.open_storage(nowhere).fullness()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_room_says_so_and_keeps_what_was_there(
    store: BaseStorage, settings: Settings, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store.put("a/0.png", b"the old one")

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    for key in ("a/0.png", "b/0.png"):
        with pytest.raises(StorageFull, match="ZFLEET_RETENTION_DAYS") as caught:
            store.put(key, b"a new one")
        assert (caught.value.code, caught.value.retryable) == ("storage_full", True)
    monkeypatch.undo()
    assert store.read("a/0.png") == b"the old one"
    assert [path.name for path in settings.results_dir.rglob("*")] == ["a", "0.png"]
    store.put("b/0.png", b"a new one")
    assert store.read("b/0.png") == b"a new one"


def test_what_is_put_survives_a_power_cut(
    store: BaseStorage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        shown = settings.results_dir / "20260131/w1/abc/0.png"
        synced.append(path if path.is_dir() or shown.exists() else path.with_name("before the rename"))

    monkeypatch.setattr(os, "fsync", note)
    store.put("20260131/w1/abc/0.png", b"x")
    day = settings.results_dir / "20260131"
    new = {day / "w1/abc", day / "w1", day, settings.results_dir, settings.results_dir.parent}
    assert set(synced) == new | {day / "w1/abc/before the rename"}
    assert synced[-1] == day / "w1/abc", "the folder is synced last, once the file has its name"
    synced.clear()
    store.put("20260131/w1/abc/1.png", b"x")
    assert synced[1:] == [day / "w1/abc"], "a second picture syncs itself and its folder"


def test_a_failed_write_leaves_nothing_and_names_the_cause(settings: Settings) -> None:
    settings.results_dir.parent.mkdir(parents=True)
    settings.results_dir.write_text("a file where the folder should be")
    store = storage.open_storage(settings)
    with pytest.raises(StorageError, match="cannot write"):
        store.put("a/0.png", b"x")
    assert list(settings.results_dir.parent.iterdir()) == [settings.results_dir]


@pytest.mark.parametrize("name", ["base", "os", "../x", "", "common.storage.local", "nowhere"])
def test_only_discovered_names_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        storage.open_storage(load_settings({"storage": name, "data_dir": tmp_path}))
