"""Pictures as files below ZFLEET_DATA_DIR/results, on one machine or on a file system that all of them share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from pathlib import Path

from common.errors import NotStored, StorageError, StorageFull
from common.settings import Settings
from common.storage.base import STRAY_S, BaseStorage, Disk, checked

PARTIAL = ".partial"  # the ending of a file that is being written

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # a folder that cannot be synced, or not by us


class Storage(BaseStorage):
    """Writes to a temporary name, syncs, then renames: a key either holds a whole object or none."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._root = settings.results_dir

    def put(self, key: str, data: bytes) -> None:
        target = self.path(key)
        partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
        try:
            self._make(target.parent)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            _sync(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._prune(target.parent)  # so that the next try makes it anew, and syncs it
            raise _told(error, "write the picture") from error

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            self.check()
            raise NotStored("the picture is not in storage") from None
        except OSError as error:
            raise _told(error, "read the picture") from error

    def exists(self, key: str) -> bool:
        try:
            return stat.S_ISREG(self.path(key).stat().st_mode)
        except FileNotFoundError:
            self.check()
            return False
        except OSError as error:
            raise _told(error, "look for the picture") from error

    def head(self, key: str, count: int) -> bytes:
        try:
            with self.path(key).open("rb") as file:
                return file.read(count)
        except OSError as error:
            raise _told(error, "read the picture") from error

    def touch(self, key: str) -> None:
        try:
            os.utime(self.path(key))
        except OSError as error:
            raise _told(error, "keep the picture") from error

    def delete(self, key: str) -> None:
        path = self.path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _told(error, "remove the picture") from error
        self._prune(path.parent)

    def remove(self, folder: str) -> None:
        try:
            shutil.rmtree(self.path(folder))
        except FileNotFoundError:
            pass  # a sweep may remove the same files
        except OSError as error:
            raise _told(error, "remove the pictures") from error

    def check(self) -> None:
        if not self._root.is_dir():
            raise StorageError(f"there is no folder {self._root}; is it mounted?")

    def path(self, key: str) -> Path:
        return self._root / checked(key)

    def sweep(self, older_than_s: float) -> int:
        now = time.time()
        removed = 0
        for folder, _, names in os.walk(self._root, topdown=False):
            for name in names:
                path = Path(folder, name)
                limit_s = STRAY_S if name.endswith(PARTIAL) else older_than_s
                with contextlib.suppress(OSError):  # another worker may sweep the same folder
                    if path.stat().st_mtime < now - limit_s:
                        path.unlink()
                        removed += 1
            with contextlib.suppress(OSError):
                if Path(folder).stat().st_mtime < now - STRAY_S:  # one just made is about to be used
                    self._prune(Path(folder))
        return removed

    def disk(self) -> Disk:
        try:
            folder = self._root
            while not folder.exists():  # nothing has been stored yet
                folder = folder.parent
            usage, flags = shutil.disk_usage(folder), os.statvfs(folder).f_flag
        except OSError as error:
            raise _told(error, "measure the disk") from error
        return Disk(usage.free, usage.used + usage.free, bool(flags & os.ST_RDONLY))  # sizes as df has them

    def _make(self, folder: Path) -> None:
        """Make sure that the folder is there, and stays there after a power cut."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self._root.parent:  # all of them: another worker may have made one and not synced it yet
            folder = folder.parent
            _sync(folder)

    def _prune(self, folder: Path) -> None:
        """Remove the folder if nothing is in it."""
        with contextlib.suppress(OSError):
            if folder != self._root:
                folder.rmdir()


def _sync(folder: Path) -> None:
    """Write to the disk what stands in the folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _told(error: OSError, what: str) -> StorageError:
    """Return what a client or an operator may know of the error."""
    cause = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return StorageFull(f"cannot {what}: {cause}; free space in ZFLEET_DATA_DIR or lower ZFLEET_RETENTION_DAYS")
    return StorageError(f"cannot {what}: {cause}")
