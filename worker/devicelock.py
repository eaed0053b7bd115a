"""One supervisor's worker to a GPU, also while the workers of one that was killed still finish."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path


def acquire(gpu_index: str) -> int | None:
    """Return a descriptor that holds this machine's lock on a GPU, or None where another process has it.

    Whoever inherits the descriptor holds the lock too: it is free once the supervisor and its worker are both gone.
    """
    path = Path(tempfile.gettempdir(), f"zfleet-gpu{gpu_index}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
