"""One suite over every storage: what a worker writes, the gateway reads whole or not at all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from common import registry, storage
from common.errors import ConfigurationError, StorageError
from common.settings import Settings, load_settings
from common.storage.base import BaseStorage, attempt_folder, discard_attempt
from tests.s3server import BUCKET, S3Server, show_credentials


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as server:
        show_credentials(patch)
        yield server


@pytest.fixture(params=registry.discover(storage))
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Return what makes each kind work here. One that needs a server brings it."""
    kinds = {"s3": lambda: s3_settings(request.getfixturevalue("s3_server"), tmp_path)}
    flags = kinds.get(request.param, dict)()
    return load_settings({"storage": request.param, "data_dir": tmp_path / "a b", **flags})


def s3_settings(server: S3Server, tmp_path: Path) -> dict[str, str]:
    return {"s3_url": f"s3://{BUCKET}/{tmp_path.name}", "s3_endpoint": server.endpoint}


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


def test_what_is_touched_counts_as_new(store: BaseStorage, age: Callable[[str, float], None]) -> None:
    store.put("a/0.png", b"x")
    age("a/0.png", 1000)
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


@pytest.fixture
def age(request: pytest.FixtureRequest, store: BaseStorage, tmp_path: Path) -> Callable[[str, float], None]:
    """Make what is stored under a key look so many seconds old."""

    def make(key: str, age_s: float) -> None:
        path = store.path(key)
        if path is None:
            request.getfixturevalue("s3_server").age(f"{tmp_path.name}/{key}", age_s)
        else:
            os.utime(path, (time.time() - age_s,) * 2)

    return make


def test_a_sweep_removes_the_old_and_keeps_the_new(store: BaseStorage, age: Callable[[str, float], None]) -> None:
    store.put("old/0.png", b"x")
    store.put("new/0.png", b"x")
    age("old/0.png", 1000)
    age("new/0.png", 300)
    assert store.sweep(500) == 1
    assert store.read("new/0.png") == b"x"
    assert not store.exists("old/0.png")
    assert store.sweep(500) == 0


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
    store.remove("20260131/w1/abc")
    store.remove("20260131/w1/abc")
    for key in ("20260131/w1/abc/0.png", "20260131/w1/abc/1.png"):
        with pytest.raises(StorageError):
            store.read(key)
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


@pytest.mark.parametrize("name", ["base", "os", "../x", "", "common.storage.local", "nowhere"])
def test_only_discovered_names_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        storage.open_storage(load_settings({"storage": name, "data_dir": tmp_path}))
