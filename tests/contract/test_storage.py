"""One suite over every storage: what a worker writes, the gateway reads whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from common import registry, storage
from common.errors import ConfigurationError, StorageError
from common.settings import Settings, load_settings
from common.storage.base import BaseStorage

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


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".hidden", "a/..", "a\x00b", "a\\b"])
def test_a_key_never_leaves_the_storage(store: BaseStorage, key: str) -> None:
    for call in (lambda: store.put(key, b"x"), lambda: store.read(key), lambda: store.delete(key)):
        with pytest.raises(StorageError):
            call()


def test_a_sweep_removes_the_old_and_keeps_the_new(store: BaseStorage) -> None:
    store.put("old/0.png", b"x")
    store.put("new/0.png", b"x")
    path = store.path("old/0.png")
    assert path is not None
    stray = path.with_name("1.png.77.partial")
    stray.write_bytes(b"half")
    long_ago = time.time() - 1000
    for old in (path, stray):
        os.utime(old, (long_ago, long_ago))
    assert store.sweep(500) == 2
    assert store.read("new/0.png") == b"x"
    assert not path.exists()


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
