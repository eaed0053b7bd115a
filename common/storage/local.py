"""Pictures as files below ZFLEET_DATA_DIR/results, on one machine or on a file system that all of them share."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from common.errors import StorageError
from common.settings import Settings
from common.storage.base import BaseStorage, checked

PARTIAL = ".partial"  # the ending of a file that is being written


class Storage(BaseStorage):
    """Writes to a temporary name, syncs, then renames: a key either holds a whole object or none."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._root = settings.results_dir

    def put(self, key: str, data: bytes) -> None:
        target = self.path(key)
        partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageError(f"cannot write the picture: {error.strerror or error}") from error

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the picture: {error.strerror or error}") from error

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove the picture: {error.strerror or error}") from error

    def path(self, key: str) -> Path:
        return self._root / checked(key)

    def sweep(self, older_than_s: float) -> int:
        horizon = time.time() - older_than_s
        removed = 0
        for folder, _, names in os.walk(self._root, topdown=False):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):  # another worker may sweep the same folder
                    if path.stat().st_mtime < horizon:
                        path.unlink()
                        removed += 1
            with contextlib.suppress(OSError):  # not empty, or in use
                if Path(folder) != self._root and Path(folder).stat().st_mtime < horizon:
                    Path(folder).rmdir()
        return removed
