"""When a worker has to be killed: what it is at stands still, by its heartbeat and the machine's monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from common.settings import Settings
from worker.heartbeat import InHand, Reading, Stage

FUSE_GRACE_S = 2.0  # the worker itself stops a run between two steps; this much later it is not going to


class Stall(NamedTuple):
    """Why a worker has to be killed, which tasks have passed a limit, and whether those it is at are to blame."""

    cause: str
    tripped: Sequence[InHand] = ()
    blame: bool = True


def stall(reading: Reading, settings: Settings) -> Stall | None:
    """Return what stands still, or None while all goes on."""
    now = time.monotonic()
    standing_s = now - reading.since
    if reading.stage in (Stage.STARTING, Stage.LOADING):
        return Stall("load_limit") if standing_s > settings.load_limit_s else None
    if now - reading.store_since > settings.step_limit_s:  # a storage that hangs is no task's fault
        return Stall("store_limit", blame=False)
    if reading.stage is not Stage.BUSY:
        return None
    if standing_s > FUSE_GRACE_S:
        tripped = [task for task in reading.on_device if now > task.stop_at + FUSE_GRACE_S]
        if tripped:
            return Stall("fuse", tripped)
    return Stall("step_limit") if standing_s > settings.step_limit_s else None
