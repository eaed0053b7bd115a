"""Pipelines made up for tests: they take memory of a device that they share, leak, load slowly, or fail to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ModelLoadFailed, OutOfMemory
from common.models import Catalogue, ModelSpec
from worker.pipelines.base import MIB, BasePipeline, ImageRequest, Run


@dataclass
class Device:
    """What all pipelines of a test share. Sizes in MiB."""

    memory_mb: int = 1000
    weights_mb: dict[str, int] = field(default_factory=dict)  # by model; 100 for others
    leaks_mb: dict[str, int] = field(default_factory=dict)  # by model: what stays behind when it is let go
    broken: dict[str, Exception] = field(default_factory=dict)  # by model: why it cannot be loaded
    load_s: float = 0.0
    peak_mb: int = 0  # of one picture; more of them take as much each
    kept_mb: dict[str, int] = field(default_factory=dict)  # by model: for later runs, none of which hold it
    used_mb: int = 0
    loads: list[str] = field(default_factory=list)
    steps: list[tuple[str, list[int]]] = field(default_factory=list)  # model and seeds


class Made(BasePipeline):
    """A pipeline on such a device. A prompt `keep N` leaves N MiB behind when its run is discarded."""

    world: Device
    _there = False

    def load(self) -> None:
        name = self.spec.name
        self.world.loads.append(name)
        time.sleep(self.world.load_s)
        if name in self.world.broken:
            raise self.world.broken[name]
        if self.world.used_mb + self.mine > self.world.memory_mb:
            raise ModelLoadFailed("not enough GPU memory") from OutOfMemory("allocator")
        self.world.used_mb += self.mine
        self._there = True

    def warm(self, sizes: Sequence[tuple[int, int]] = ()) -> None: ...

    @property
    def mine(self) -> int:
        return self.world.weights_mb.get(self.spec.name, 100)

    def start(self, request: ImageRequest) -> Run:
        return Run(request=request)

    def step(self, runs: Sequence[Run]) -> None:
        self.world.steps.append((self.spec.name, [run.request.seed for run in runs]))
        for run in runs:
            run.step += 1

    def finish(self, run: Run) -> NDArray[np.uint8]:
        return np.zeros((run.request.height, run.request.width, 3), np.uint8)

    def discard(self, run: Run) -> None:
        word, _, number = run.request.prompt.partition(" ")
        if word == "keep":
            self.world.used_mb += int(number)

    def batch_key(self, run: Run) -> str:
        return run.request.prompt

    def unload(self) -> int:
        if not self._there:
            return 0
        left = self.world.leaks_mb.get(self.spec.name, 0)
        self.world.used_mb -= self.mine - left
        return left * MIB

    def weight_bytes(self) -> int:
        return self.mine * MIB

    def allocated_bytes(self) -> int:
        return self.world.used_mb * MIB

    def peak_bytes(self, requests: Sequence[ImageRequest]) -> int:
        return sum(request.width // 64 for request in requests) * self.world.peak_mb * MIB

    def counters(self) -> Mapping[str, float]:
        return {"pictures": 1.0, "kept_bytes": self.world.kept_mb.get(self.spec.name, 0) * MIB}

    def evict(self) -> None:
        self.world.kept_mb.pop(self.spec.name, None)


def device(monkeypatch: pytest.MonkeyPatch, **what: object) -> Device:
    """Let all models be made up, on a device of their own."""
    made = Device(**what)  # type: ignore[arg-type]
    pipeline = type("Pipeline", (Made,), {"world": made})
    monkeypatch.setattr("worker.loading.registry.load", lambda *_: SimpleNamespace(Pipeline=pipeline))
    return made


def catalogue(*names: str, memory_mb: int = 0) -> Catalogue:
    return Catalogue(
        ModelSpec(
            name=name, source="builtin", pipeline="simulated", width=64, height=64, min_side=64, memory_mb=memory_mb
        )
        for name in names
    )
