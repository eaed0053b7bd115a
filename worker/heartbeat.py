"""What a worker has on its device and since when, in memory that its supervisor can read, also after its death."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

Cause = Literal["run_limit", "deadline"]

_HEAD = struct.Struct("<BxxxIdI")  # stage, device memory in MiB, since, how many entries follow
_STAGE_AT, _MEMORY_AT, _SINCE_AT, _COUNT_AT = 0, 4, 8, 16
_SINCE = struct.Struct("<d")
_NUMBER = struct.Struct("<I")
_ENTRY = struct.Struct("<64sIdB")  # task id, fence, stop_at, cause
_CAUSES: tuple[Cause, ...] = ("run_limit", "deadline")
_MOST_ENTRIES = 256  # tasks beyond are not told of; no device advances that many at once
_SIZE = _HEAD.size + _MOST_ENTRIES * _ENTRY.size


class Stage(IntEnum):
    """What a worker is at."""

    STARTING = 0
    LOADING = 1
    IDLE = 2
    BUSY = 3  # in a call on the device


class OnDevice(NamedTuple):
    """A task whose run is in the call on the device. `stop_at`, on the monotonic clock, may be infinite."""

    task_id: str
    fence: int
    stop_at: float
    cause: Cause


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A worker's state. `since` is when its stage, or the call it is in, began, on the machine's monotonic clock."""

    stage: Stage
    since: float
    device_mb: int
    on_device: Sequence[OnDevice]


def shared_file() -> int:
    """Return the descriptor of a new nameless file for one heartbeat, to be handed to a child."""
    with tempfile.TemporaryFile(prefix="zfleet-heartbeat-") as file:
        file.truncate(_SIZE)
        return os.dup(file.fileno())


class Heartbeat:
    """The worker writes, the supervisor reads. Without a descriptor nobody else sees it."""

    def __init__(self, descriptor: int = -1) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._carried: Sequence[OnDevice] | None = None

    def at(self, stage: Stage) -> None:
        """Say what begins now."""
        # in this order, so that no reader takes a call that just begins for one that began long ago
        _SINCE.pack_into(self._memory, _SINCE_AT, time.monotonic())
        self._memory[_STAGE_AT] = stage

    def busy(self, on_device: Sequence[OnDevice]) -> None:
        """Say that a call on the device begins, and whose runs are in it."""
        if on_device != self._carried:
            self._carry(on_device)
        self.at(Stage.BUSY)

    def holds_memory(self, device_mb: int) -> None:
        """Say how much of the device's memory this process keeps between two steps."""
        _NUMBER.pack_into(self._memory, _MEMORY_AT, device_mb)

    def read(self) -> Reading:
        """Return the state; what was on the device stays told until something else is."""
        stage, device_mb, since, count = _HEAD.unpack_from(self._memory)
        entries = [_ENTRY.unpack_from(self._memory, _HEAD.size + i * _ENTRY.size) for i in range(count)]
        on_device = [
            OnDevice(name.rstrip(b"\0").decode(), fence, stop_at, _CAUSES[cause])
            for name, fence, stop_at, cause in entries
        ]
        busy = Stage(stage) is Stage.BUSY
        return Reading(stage=Stage(stage), since=since, device_mb=device_mb, on_device=on_device if busy else ())

    def standing_s(self) -> float:
        """Return how long the worker has been in the call it is in; 0 where it is in none."""
        reading = self.read()
        return time.monotonic() - reading.since if reading.stage is Stage.BUSY else 0.0

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()

    def _carry(self, on_device: Sequence[OnDevice]) -> None:
        told = on_device[:_MOST_ENTRIES]
        _NUMBER.pack_into(self._memory, _COUNT_AT, 0)  # a worker killed in between blames nobody
        for index, entry in enumerate(told):
            where = _HEAD.size + index * _ENTRY.size
            name = entry.task_id.encode()
            _ENTRY.pack_into(self._memory, where, name, entry.fence, entry.stop_at, _CAUSES.index(entry.cause))
        _NUMBER.pack_into(self._memory, _COUNT_AT, len(told))
        self._carried = list(on_device)
