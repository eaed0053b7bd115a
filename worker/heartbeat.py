"""What a worker has in hand and since when, in memory that its supervisor can read, also after its death.

A number is stored and read as a whole, eight bytes at once, for the other side may look at any moment.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from common.records import Fuse

_CAUSES: tuple[Fuse, ...] = ("run_limit", "deadline")
_ENTRY = struct.Struct("<64sIdB64s")  # task id, fence, stop_at, cause, request id
_MOST_ENTRIES = 256  # tasks beyond are not told of; no device advances that many at once

# Places of the numbers, and where the two lists of entries begin
_STAGE, _SINCE, _MEMORY, _ON_DEVICE, _IN_STORE, _DONE, _STORE_SINCE, _CHANGES, _MODELS = range(9)
_NUMBERS = 9 * 8  # bytes
_LIST = _MOST_ENTRIES * _ENTRY.size
_SIZE = _NUMBERS + 2 * _LIST


class Stage(IntEnum):
    """What a worker is at."""

    STARTING = 0
    LOADING = 1  # a model, or letting go of one
    IDLE = 2
    BUSY = 3  # in a call on the device


class InHand(NamedTuple):
    """A task that a worker is at. `stop_at`, on the monotonic clock, may be infinite."""

    task_id: str
    fence: int
    stop_at: float
    cause: Fuse
    request_id: str = ""

    @property
    def about(self) -> Mapping[str, str | int]:
        """What a line of the log says of which task it is about."""
        return {"task_id": self.task_id, "request_id": self.request_id, "attempt": self.fence}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A worker's state. `since` is when its stage, or the call it is in, began, on the machine's monotonic clock."""

    stage: Stage
    since: float
    device_mb: int
    done: int  # pictures made and committed
    on_device: Sequence[InHand]  # in the call that it is in, or what a model is being loaded for
    in_store: Sequence[InHand]  # being encoded or stored, beside that
    store_since: float = math.inf  # when the oldest of their writes began
    models_changed: int = 0  # how often a model was loaded or let go
    models: int = 0  # which are in memory: the same number for the same ones


def shared_file() -> int:
    """Return the descriptor of a new nameless file for one heartbeat, to be handed to a child."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("zfleet-heartbeat")  # in memory, as to touch a page of a full disk is a SIGBUS
    else:
        with tempfile.TemporaryFile(prefix="zfleet-heartbeat-") as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _SIZE)
    return descriptor


class Heartbeat:
    """The worker writes, the supervisor reads. Without a descriptor nobody else sees it."""

    def __init__(self, descriptor: int = -1) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._bytes = memoryview(self._memory)
        self._numbers = self._bytes[:_NUMBERS].cast("d")
        self._told: dict[int, Sequence[InHand]] = {}

    def at(self, stage: Stage) -> None:
        """Say what begins now."""
        # in this order, so that no reader takes a call that just begins for one that began long ago
        self._numbers[_SINCE] = time.monotonic()
        self._numbers[_STAGE] = stage

    def busy(self, on_device: Sequence[InHand]) -> None:
        """Say that a call on the device begins, and whose runs are in it."""
        self._begin(Stage.BUSY, on_device)

    def loading(self, on_device: Sequence[InHand] = ()) -> None:
        """Say that a model may be loaded or let go from here on, and for whom."""
        self._begin(Stage.LOADING, on_device)

    def storing(self, in_store: Sequence[InHand], since: float = math.inf) -> None:
        """Say whose pictures are being encoded and stored, and when the oldest write began; by one thread at a time."""
        self._numbers[_STORE_SINCE] = since
        self._tell(_IN_STORE, in_store)

    def holds_memory(self, device_mb: int) -> None:
        """Say how much of the device's memory this process keeps between two steps."""
        self._numbers[_MEMORY] = device_mb

    def has_models(self, names: Iterable[str], changed: int) -> None:
        """Say which models are in memory, and how often one was loaded or let go: memory is judged anew then."""
        self._numbers[_MODELS] = zlib.crc32("\n".join(sorted(names)).encode())
        self._numbers[_CHANGES] = changed

    def has_done(self, pictures: int) -> None:
        """Say how many pictures this worker has made and committed."""
        self._numbers[_DONE] = pictures

    def read(self) -> Reading:
        """Return the state; what was on the device stays told until something else is."""
        stage = Stage(int(self._numbers[_STAGE]))
        return Reading(
            stage=stage,
            since=self._numbers[_SINCE],
            device_mb=int(self._numbers[_MEMORY]),
            done=int(self._numbers[_DONE]),
            on_device=self._listed(_ON_DEVICE) if stage in (Stage.BUSY, Stage.LOADING) else (),
            in_store=self._listed(_IN_STORE),
            store_since=self._numbers[_STORE_SINCE] or math.inf,
            models_changed=int(self._numbers[_CHANGES]),
            models=int(self._numbers[_MODELS]),
        )

    def standing_s(self) -> float:
        """Return how long the worker has been in the call it is in; 0 where it is in none."""
        reading = self.read()
        return time.monotonic() - reading.since if reading.stage is Stage.BUSY else 0.0

    def close(self) -> None:
        """Let go of the memory."""
        self._numbers.release()
        self._bytes.release()
        self._memory.close()

    def _begin(self, stage: Stage, on_device: Sequence[InHand]) -> None:
        self._numbers[_SINCE] = time.monotonic()
        self._tell(_ON_DEVICE, on_device)
        self._numbers[_STAGE] = stage

    def _tell(self, which: int, entries: Sequence[InHand]) -> None:
        if entries == self._told.get(which):
            return
        told = entries[:_MOST_ENTRIES]
        self._numbers[which] = 0  # a worker killed in between blames nobody
        for where, entry in zip(_places(which), told, strict=False):
            name = entry.task_id.encode()
            cause, request_id = _CAUSES.index(entry.cause), entry.request_id.encode()
            _ENTRY.pack_into(self._memory, where, name, entry.fence, entry.stop_at, cause, request_id)
        self._numbers[which] = len(told)
        self._told[which] = list(entries)

    def _listed(self, which: int) -> Sequence[InHand]:
        entries = []
        for _, where in zip(range(int(self._numbers[which])), _places(which), strict=False):
            name, fence, stop_at, cause, request_id = _ENTRY.unpack_from(self._memory, where)
            entries.append(InHand(_text(name), fence, stop_at, _CAUSES[cause], _text(request_id)))
        return entries


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")


def _places(which: int) -> range:
    begin = _NUMBERS + (which - _ON_DEVICE) * _LIST
    return range(begin, begin + _LIST, _ENTRY.size)
