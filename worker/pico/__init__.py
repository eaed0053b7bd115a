"""pico: a real but tiny Z-Image checkpoint with random weights, so that the fleet runs on a laptop with no download."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

VERSION = "1"  # raise it whenever build.py writes other bytes: a cache from an older zfleet is then left alone


def folder(cache_dir: Path) -> Path:
    """Return the folder of the pico checkpoint in the diffusers layout, building it on first use (a few seconds).

    Processes may race: each builds beside the target and renames, the first rename wins and all return the same
    folder. Raises OSError when `cache_dir` cannot be written.
    """
    target = cache_dir / f"pico-{VERSION}"
    if target.is_dir():
        return target
    from worker.pico import build  # brings torch in, which a cached checkpoint does not need

    cache_dir.mkdir(parents=True, exist_ok=True)
    draft = cache_dir / f".pico-{VERSION}-{uuid.uuid4().hex}"
    try:
        build.write(draft)
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, and its bytes are as good as ours
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
