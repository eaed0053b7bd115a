"""Files that processes append lines to: bounded in size, and no two processes write one."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging.handlers
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common.errors import ConfigurationError

ROTATE_BYTES = 100 * 1024 * 1024
ROTATE_KEEP = 7
MAX_SLOTS = 256

_locks: list[IO[str]] = []  # held for the life of the process


class LogFile(logging.handlers.RotatingFileHandler):
    """A file that is renamed to NAME.1 and begun anew when it is full; the oldest goes. `header` begins each one."""

    def __init__(self, path: Path, header: str = "") -> None:
        """Raises OSError."""
        self._header = header
        super().__init__(path, maxBytes=ROTATE_BYTES, backupCount=ROTATE_KEEP, encoding="utf-8")

    def append(self, line: str) -> None:
        """Write a line. A full disk costs the line, not the work that it tells of."""
        with self.lock or contextlib.nullcontext(), contextlib.suppress(OSError, ValueError):
            if self.stream is None:  # it could not be begun anew
                self.stream = self._open()
            elif os.fstat(self.stream.fileno()).st_size >= self.maxBytes:
                self.doRollover()
            self.stream.write(line + "\n")
            self.flush()

    def _open(self) -> io.TextIOWrapper:
        stream = super()._open()
        if self._header and os.fstat(stream.fileno()).st_size == 0:
            stream.write(self._header + "\n")
        return stream


def open_log(folder: Path, name: Callable[[int], str], header: str = "") -> LogFile:
    """Open the file of the first slot that no other living process has; `name` gives a slot's file.

    Raises ConfigurationError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return LogFile(_free(folder, name), header)
    except OSError as error:
        raise ConfigurationError(f"ZFLEET_LOG_DIR {folder}: {error.strerror or error}") from None


def _free(folder: Path, name: Callable[[int], str]) -> Path:
    for slot in range(MAX_SLOTS):
        path = folder / name(slot)
        lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _locks.append(lock)
        return path
    raise OSError(f"more than {MAX_SLOTS} processes log as {name(0)}")
