"""The models in this process's memory: loaded when needed, counted while in use, gone when idle or in another's way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from common.errors import ModelLoadFailed, OutOfMemory
from common.models import Catalogue, ModelSpec
from common.telemetry import get_logger
from worker import vram
from worker.loading import Cause, Failure, Loader, Size
from worker.pipelines.base import DEFAULT_TUNING, MIB, BasePipeline, ImageRequest, Tuning
from worker.residue import Baseline, add, held_bytes, is_level, kept_bytes

log = get_logger()

FIRST_PAUSE_S = 60.0  # until a model that could not be loaded is tried again; doubles from there
LONGEST_PAUSE_S = 600.0
LEAK_SHARE = 0.05  # of a model's weights; as much left after it was let go, and this process is to be renewed


class Pause(NamedTuple):
    """A model that could not be loaded is left out for a while. `until` is on time.monotonic's clock."""

    message: str
    seconds: float
    until: float


@dataclass(eq=False)
class Resident:
    """A model in memory. `used_at` is on time.monotonic's clock."""

    pipeline: BasePipeline
    bytes: int  # of the device that it takes
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)


class Residency:
    """Hands out pipelines as worker/loans.py asks for them. Only the engine's thread changes anything here."""

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        device: str,
        tuning: Tuning = DEFAULT_TUNING,
        warm_sizes: Sequence[Size] = (),
        keep: Sequence[str] | None = None,
        max_resident: int | None = None,
        idle_s: float = math.inf,
        memory_mb: int | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`keep` names the models that are loaded ahead and stay while idle (None: the first); others go when not used
        for `idle_s`. At most `max_resident` stay, and no more than the device's `memory_mb` holds. `changed` is called
        after a model was loaded or let go, or could not be loaded.
        """
        self._catalogue = catalogue
        self._loader = Loader(device, tuning, warm_sizes)
        self._keep = (catalogue.default.name,) if keep is None else tuple(keep)
        self._max_resident = max_resident or len(catalogue)
        self._idle_s = idle_s
        self._memory_mb = memory_mb
        self._changed = changed
        self._residents: dict[str, Resident] = {}
        self._pauses: dict[str, Pause] = {}
        self._short: dict[str, int] = {}  # by model that there was too little memory for: `_departures` at that time
        self._departures = 0  # how often a model came out of use
        self._loads: dict[str, int] = {}  # by model, since the start
        self._unloads = 0
        self._largest: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # in bytes, of the models that were loaded so far
        self._past: dict[str, float] = {}  # counted by pipelines that are gone
        self._baseline = Baseline()
        self.swapped_at = -math.inf  # when a model last left to make room
        self.leaked = False  # a model left too much behind: this process is to be renewed, and loads no more

    # What any thread may ask

    @property
    def loaded(self) -> Sequence[str]:
        """The aliases of the models in memory."""
        return tuple(self._residents)

    @property
    def offered(self) -> Sequence[str]:
        """The aliases of the models in memory and of all that would be loaded for a task."""
        return tuple(model for model in self._catalogue if not self._pauses_now(model))

    @property
    def changes(self) -> int:
        """How often a model was loaded or let go."""
        return sum(self._loads.values()) + self._unloads

    def counters(self) -> Mapping[str, float]:
        """Return what was counted since the start, by metric name; what ends in `_bytes` is what is kept now."""
        total: dict[str, float] = {
            "models_loaded_total": sum(self._loads.values()),
            "models_unloaded_total": self._unloads,
            "memory_residues": self._baseline.residues,
        }
        add(total, self._past)
        for resident in tuple(self._residents.values()):
            add(total, resident.pipeline.counters())
        return total

    @property
    def largest(self) -> Mapping[str, int]:
        """The pixels of the largest picture that there is memory for, by model that was loaded so far."""
        return dict(self._largest)

    # What the engine asks

    def acquire(self, model: str) -> float | None:
        """Keep a model in memory until it is released as often; return the seconds that loading it took.

        None: it cannot be loaded before a model that is in use is released. Raises ModelLoadFailed.
        """
        load_s = 0.0
        if model not in self._residents:
            if self._pauses_now(model):
                raise ModelLoadFailed(self._pauses[model].message)
            began = time.perf_counter()
            if not self._load(model, "again" if model in self._loads else "first_use"):
                return None
            load_s = time.perf_counter() - began
        self._residents[model].users += 1
        return load_s

    def release(self, model: str) -> None:
        """Undo one `acquire`."""
        resident = self._residents[model]
        resident.users -= 1
        resident.used_at = time.monotonic()
        self._departures += not resident.users

    def pipeline(self, model: str) -> BasePipeline:
        """Return the pipeline of a model in memory."""
        return self._residents[model].pipeline

    def fits(self, model: str, requests: Sequence[ImageRequest]) -> bool:
        """Whether there is memory to make these pictures together; what is kept for later and models that nobody uses
        leave for it.

        Raises OutOfMemory, naming the limit, if there is too little for the last of them alone.
        """
        own = self._residents[model]
        at_most = self._budget([own])
        if at_most is None:
            return True
        alone = own.pipeline.peak_bytes(requests[-1:])
        if alone > at_most:
            raise OutOfMemory(
                f"the picture takes about {math.ceil(alone / MIB)} MiB, and of this worker's {self._memory_mb} MiB of "
                f"memory model {model} leaves {at_most // MIB}; ask for a smaller one"
            )
        while (missing := self._missing(own.pipeline.peak_bytes(requests))) > 0:
            if not (self._evict(missing) or self._make_way()):
                return False
        return True

    def settle(self, model: str, made: Mapping[str, Sequence[ImageRequest]]) -> None:
        """Hear that a picture of this model has left, and by model what is still being made: see what is held beside.

        That is compared with the level at rest and all that those pictures may take.
        """
        if held := self._held():
            at_most = sum(self.pipeline(name).peak_bytes(requests) for name, requests in made.items() if requests)
            self._baseline.compare(model, held, beside=at_most)

    # What the worker asks between two turns

    def prewarm(self) -> None:
        """Load the models to keep, as far as there is room; if none of them can be loaded, any other.

        Raises ModelLoadFailed if there is none at all.
        """
        for model in self._keep:
            if not self._is_full_for(self._catalogue[model]):
                self._load_ahead(model)
        for model in self._catalogue if self._keep else ():
            if not self._residents:
                self._load_ahead(model)
        if self._keep and not self._residents:
            raise ModelLoadFailed(self._pauses[self._keep[0]].message)

    def idle(self) -> Sequence[str]:
        """Return the models that have not been used for so long that they are to be let go."""
        before = time.monotonic() - self._idle_s
        return [name for name in self._unused() if name not in self._keep and self._residents[name].used_at < before]

    def unload(self, model: str, cause: Literal["idle", "room"]) -> None:
        """Let go of a model that nobody uses, and verify that its memory is free; `leaked` says so if it is not."""
        began, before, resident = time.perf_counter(), self._held(), self._residents.pop(model)
        weights = resident.pipeline.weight_bytes()
        past = dict(self._past)  # another, as other threads may be reading this one
        add(past, {name: n for name, n in resident.pipeline.counters().items() if not is_level(name)})
        self._past = past
        left = resident.pipeline.unload()
        self._baseline.bytes += self._held(resident.pipeline) - before
        self._unloads += 1
        duration_ms = round((time.perf_counter() - began) * 1000, 1)
        log.info("model_unloaded", model=model, cause=cause, bytes=weights, left=left, duration_ms=duration_ms)
        if left and left >= LEAK_SHARE * weights:
            log.error("unload_leaked", model=model, bytes=weights, left=left)
            self.leaked = True
        self._changed()

    def memory_used_mb(self) -> int:
        """Return the device memory that this process holds, in MiB."""
        return max((resident.pipeline.memory_used_mb() for resident in self._residents.values()), default=0)

    # Below the surface

    def _load_ahead(self, model: str) -> None:
        if model not in self._residents and model not in self._pauses:
            try:
                self._load(model, "prewarm")
            except ModelLoadFailed:  # told; this worker serves the others, and tasks for this one wait for another
                return

    def _load(self, model: str, cause: Cause) -> bool:
        """Load a model; return False where it has to wait for room. Raises ModelLoadFailed."""
        spec = self._catalogue[model]
        if self._short.get(model) == self._departures or not self._make_room(spec):
            return False
        loaded = self._try(spec, cause)
        if isinstance(loaded, Failure) and loaded.for_memory and self._make_way():
            while self._make_way():
                pass
            if self.leaked:
                return False
            loaded = self._try(spec, cause)
        if isinstance(loaded, Failure):
            if loaded.for_memory and self._residents:
                self._short[model] = self._departures  # not again before one of them is out of use
                return False
            self._pause(model, loaded.message)
            raise ModelLoadFailed(loaded.message)
        self._residents[model] = loaded
        self._sizes[model] = loaded.bytes
        self._largest[model] = vram.largest_picture(loaded.pipeline, spec, self._budget([loaded]))
        self._pauses.pop(model, None)
        self._loads = {**self._loads, model: self._loads.get(model, 0) + 1}
        loaded.users += 1  # while others may have to leave, as it is larger than was said
        while self._takes_too_much(*self._residents) and self._make_way():
            pass
        loaded.users -= 1
        self._changed()
        return True

    def _try(self, spec: ModelSpec, cause: Cause) -> Resident | Failure:
        before = self._held()
        pipeline = self._loader.load(spec, cause)
        if isinstance(pipeline, Failure):
            return pipeline
        taken = self._held(pipeline) - before
        self._baseline.bytes += taken
        return Resident(pipeline, taken if taken > 0 else pipeline.weight_bytes())

    def _pause(self, model: str, message: str) -> None:
        last = self._pauses.get(model)
        seconds = min(2 * last.seconds, LONGEST_PAUSE_S) if last else FIRST_PAUSE_S
        self._pauses[model] = Pause(message, seconds, time.monotonic() + seconds)
        log.error("model_load_failed", model=model, message=message, again_in_s=seconds)
        self._changed()

    def _pauses_now(self, model: str) -> bool:
        pause = self._pauses.get(model)
        return pause is not None and time.monotonic() < pause.until

    def _make_room(self, spec: ModelSpec) -> bool:
        while self._is_full_for(spec):
            if not self._make_way():
                return False
        return not self.leaked

    def _is_full_for(self, spec: ModelSpec) -> bool:
        """Whether a model has to leave before this one comes. One that is alone is always tried."""
        if not self._residents or len(self._residents) >= self._max_resident:
            return bool(self._residents)
        return self._takes_too_much(*self._residents, spec.name)

    def _takes_too_much(self, *models: str) -> bool:
        sizes_mb = sum(self._size_mb(self._catalogue[model]) for model in models)
        return self._memory_mb is not None and sizes_mb > self._memory_mb

    def _size_mb(self, spec: ModelSpec) -> float:
        """Return what the model is said to take or, if that is more, what it took when it was loaded."""
        return max(spec.memory_mb, self._sizes.get(spec.name, 0) / MIB)

    def _make_way(self) -> bool:
        """Let go of the model that has not been used for the longest time; return whether there was one."""
        unused = self._unused()
        if not unused:
            return False
        self.swapped_at = time.monotonic()
        self.unload(min(unused, key=lambda model: self._residents[model].used_at), "room")
        return True

    def _unused(self) -> list[str]:
        return [model for model, resident in self._residents.items() if not resident.users]

    def _missing(self, peak: int) -> int:
        """Return how many bytes a peak is above what there is beside all models and what they keep."""
        return peak + self._kept() - (self._budget(self._residents.values()) or 0)

    def _evict(self, missing: int) -> bool:
        """Let go of what pipelines keep for later runs, if that may be enough; return whether it was any."""
        kept = self._kept()
        if kept < missing:
            return False
        for resident in self._residents.values():
            resident.pipeline.evict()
        return self._kept() < kept

    def _kept(self) -> int:
        return kept_bytes(resident.pipeline for resident in self._residents.values())

    def _budget(self, residents: Collection[Resident]) -> int | None:
        """Return the bytes beside these models' weights, 0 or more; None where nobody knows."""
        if self._memory_mb is None:
            return None
        return max(0, self._memory_mb * MIB - sum(resident.bytes for resident in residents))

    def _held(self, *others: BasePipeline) -> int:
        """Return the device memory in use, which some pipeline has to tell; without any it is what it was last."""
        there = [*(resident.pipeline for resident in self._residents.values()), *others]
        return held_bytes(there) if there else self._baseline.bytes
