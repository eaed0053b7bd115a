"""The storage port. To add a kind, write a module in this folder with a class `Storage` that fulfils this contract;
`tests/contract/test_storage.py` then runs over it.
"""

from __future__ import annotations

import abc
import re
from pathlib import Path

from common.errors import StorageError
from common.settings import Settings

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class BaseStorage(abc.ABC):
    """Keeps whole objects under keys such as `20260131/worker/task/0.webp`. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store `data` so that a reader sees all of it or nothing; raises StorageError when it cannot be kept."""

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """Return the object; raises StorageError when it is not there."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is fine."""

    def path(self, key: str) -> Path | None:
        """Return the object's file on this machine, or None where there are no files."""
        return None

    def link(self, key: str, seconds: int) -> str | None:
        """Return a URL that fetches the object for so many seconds, or None where the gateway has to send it."""
        return None

    @abc.abstractmethod
    def sweep(self, older_than_s: float) -> int:
        """Remove objects, and what broken writes left behind, older than this; return how many were removed."""


def checked(key: str) -> str:
    """Return the key if every part of it is a plain name; raises StorageError otherwise, as for `../x` or `/etc`."""
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise StorageError(f"{key!r} is not a storage key")
    return key
