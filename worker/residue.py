"""What a worker's device holds beside pictures that are being made, and whether that grows although no model came."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from common.telemetry import get_logger
from worker.pipelines.base import BasePipeline

log = get_logger()

RESIDUE_SHARE = 0.03  # of what is held with the models at rest; more beside that is told


class Baseline:
    """The level that memory has to come back to. Whoever loads a model, or lets go of one, moves it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.residues = 0  # how often it did not

    def compare(self, model: str, held: int, *, beside: int = 0) -> None:
        """Tell, once, if more is `held` than should be; `model` made the picture that left last.

        `beside` is what pictures that are being made may take.
        """
        if not self.bytes or held <= self.bytes * (1 + RESIDUE_SHARE) + beside:
            return
        residue = held - self.bytes - beside
        percent = round(100 * residue / self.bytes, 1)
        log.warning("memory_residue", model=model, bytes=residue, percent=percent)
        self.bytes = held - beside
        self.residues += 1


def held_bytes(pipelines: Collection[BasePipeline]) -> int:
    """Return the device memory in use by this process, without what the pipelines keep on purpose."""
    allocated = max((pipeline.allocated_bytes() for pipeline in pipelines), default=0)  # each tells of all
    return allocated - kept_bytes(pipelines) if allocated else 0


def kept_bytes(pipelines: Iterable[BasePipeline]) -> int:
    """Return how much these pipelines keep on the device beside their weights, on purpose."""
    return int(sum(n for pipeline in pipelines for name, n in pipeline.counters().items() if is_level(name)))


def is_level(counter: str) -> bool:
    """Whether a pipeline's counter says how much it keeps on the device now, on purpose."""
    return counter.endswith("_bytes")


def add(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add counters to those of the same name."""
    for name, n in more.items():
        total[name] = total.get(name, 0) + n
