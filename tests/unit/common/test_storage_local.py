from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from common import storage
from common.errors import StorageError, StorageFull
from common.settings import Settings, load_settings
from common.storage.base import STRAY_S, BaseStorage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"data_dir": tmp_path / "a b"})


@pytest.fixture
def store(settings: Settings) -> BaseStorage:
    return storage.open_storage(settings)


def file_of(store: BaseStorage, key: str, *, age_s: float = 0.0, data: bytes | None = None) -> Path:
    """The file of a key, written here with `data` if there is any, and made to look so old."""
    path = store.path(key)
    assert path is not None
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_folder_that_has_long_been_empty_goes(store: BaseStorage) -> None:
    store.put("old/0.png", b"x")
    path = file_of(store, "old/0.png", age_s=1000)
    assert store.sweep(500) == 1
    os.utime(path.parent, (time.time() - STRAY_S - 1,) * 2)
    assert store.sweep(500) == 0
    assert not path.parent.exists()


def test_a_folder_is_removed_with_its_broken_writes(store: BaseStorage) -> None:
    stray = file_of(store, "20260131/w1/abc/2.png.77.partial", data=b"half")
    store.remove("20260131/w1/abc")
    assert not stray.exists()


@pytest.mark.parametrize("retention_s", [1.0, 7 * 86_400.0])
def test_a_broken_write_goes_after_ten_minutes_and_a_live_one_never(store: BaseStorage, retention_s: float) -> None:
    broken = file_of(store, "a/1.png.77.partial", age_s=STRAY_S + 5, data=b"half")
    live = file_of(store, "a/2.png.78.partial", age_s=STRAY_S - 60, data=b"half")
    assert store.sweep(retention_s) == 1
    assert (broken.exists(), live.exists()) == (False, True)


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
