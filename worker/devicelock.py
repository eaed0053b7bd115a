"""One supervisor's worker to a GPU, also while the workers of one that was killed still finish."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

SHARED = Path("/run/lock")  # the same for all services of a machine, as /tmp need not be


def acquire(gpu_index: str) -> int:
    """Return a descriptor that holds this machine's lock on a GPU.

    Whoever inherits the descriptor holds the lock too: it is free once the supervisor and its worker are both gone.
    Raises BlockingIOError where another process has it, and OSError where there can be no lock.
    """
    folder = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    path = folder / f"zfleet-gpu{gpu_index}.lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # another user's will do: a lock needs no more
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
