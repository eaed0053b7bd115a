"""The storage port. To add a kind, write a module in this folder with a class `Storage` that fulfils this contract;
`tests/contract/test_storage.py` then runs over it.
"""

from __future__ import annotations

import abc
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import ClassVar, NamedTuple

from common.errors import StorageError
from common.settings import Settings

LIMIT_S = 12.0  # a call that takes longer is not coming back
STRAY_S = 600.0  # what a broken write left behind is nobody's after this; a live write is never as old

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Disk(NamedTuple):
    """A disk that results are kept on, in bytes, without what is kept back for root."""

    free: int
    size: int
    read_only: bool = False  # it is mounted so, or has become it as it fails


class BaseStorage(abc.ABC):
    """Keeps whole objects under keys such as `20260131/worker/task/0.webp`. Safe to share between threads."""

    over_network: ClassVar[bool] = False  # its calls are made on sockets, which greenlets wait for without a thread

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limit_s = LIMIT_S  # the longest that a call takes before it fails, where the storage can see to that

    @abc.abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store `data` so that a reader sees all of it or nothing, and a power cut takes none of it back.

        Raises StorageError when it cannot be kept, StorageFull when there is no room for it.
        """

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """Return the object; raises NotStored when it is not there, StorageError where that cannot be told."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the object is there; raises StorageError where that cannot be told."""

    def head(self, key: str, count: int) -> bytes:
        """Return the object's first bytes; raises StorageError when it is not there."""
        return self.read(key)[:count]

    def touch(self, key: str) -> None:
        """Let the object count as stored just now, for a sweep; raises StorageError when it is not there."""
        self.put(key, self.read(key))

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is fine."""

    @abc.abstractmethod
    def remove(self, folder: str) -> None:
        """Remove every object under a folder such as `20260131/worker/task`, and every broken write; none is fine."""

    def path(self, key: str) -> Path | None:
        """Return the object's file on this machine, or None where there are no files."""
        return None

    def check(self) -> None:
        """Raise StorageError where the whole storage is out of reach, as by a mount that is gone."""

    def link(self, key: str, seconds: int) -> str | None:
        """Return a URL that fetches the object for so many seconds, or None where the gateway has to send it."""
        return None

    @abc.abstractmethod
    def sweep(self, older_than_s: float) -> int:
        """Remove objects older than this, and broken writes older than STRAY_S; return how many were removed."""

    def disk(self) -> Disk | None:
        """Return the disk's room, or None where there is no disk that could fill up.

        Raises StorageError when it cannot be told.
        """
        return None

    def fullness(self) -> float | None:
        """Return the share of the disk in use, 0 to 1, or None where there is no disk that could fill up.

        Raises StorageError when it cannot be told.
        """
        disk = self.disk()
        return 1 - disk.free / disk.size if disk and disk.size else None


def attempt_folder(worker: str, task_id: str, fence: int, day: date) -> str:
    """Return the folder of one attempt's results: its own, so that no two attempts ever write the same file."""
    return f"{day:%Y%m%d}/{worker}/{task_id}/{fence}"


def discard_attempt(storage: BaseStorage, worker: str, task_id: str, fence: int) -> None:
    """Remove what an attempt stored and, as its run has been taken back, can never commit."""
    today = datetime.now(UTC).date()
    for day in (today, today - timedelta(days=1)):  # it may have been stored before midnight
        storage.remove(attempt_folder(worker, task_id, fence, day))


def checked(key: str) -> str:
    """Return the key if every part of it is a plain name; raises StorageError otherwise, as for `../x` or `/etc`."""
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise StorageError(f"{key!r} is not a storage key")
    return key
