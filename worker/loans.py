"""What the engine asks of the models in memory, and which tasks keep which of them there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from worker.held import HeldTask
from worker.pipelines.base import BasePipeline, ImageRequest


class Models(Protocol):
    """Where the engine has its pipelines from: worker/residency.py. Only the engine's thread calls."""

    @property
    def loaded(self) -> Collection[str]:
        """The models in memory; any thread may ask."""

    def acquire(self, model: str) -> float | None:
        """Keep a model in memory until it is released as often; return the seconds that loading it took.

        None: it cannot be loaded before a model that is in use is released. Raises ModelLoadFailed.
        """

    def release(self, model: str) -> None:
        """Undo one `acquire`."""

    def pipeline(self, model: str) -> BasePipeline:
        """Return the pipeline of a model in memory."""

    def fits(self, model: str, requests: Sequence[ImageRequest]) -> bool:
        """Whether there is memory to make these pictures together; raises OutOfMemory if the last never fits."""

    def settle(self, model: str, made: Mapping[str, Sequence[ImageRequest]]) -> None:
        """Hear that a picture of this model has left, and by model what is still being made."""


class Loans:
    """Keeps a task's model in memory from its first picture until it leaves, so that no task pays for a load twice."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._borrowers: set[HeldTask] = set()

    def borrow(self, task: HeldTask) -> float | None:
        """Have the task's model in memory; return the seconds that loading took, or None where it has to wait for room.

        Raises ModelLoadFailed.
        """
        if task in self._borrowers:
            return 0.0
        load_s = self._models.acquire(task.claimed.request.model)
        if load_s is not None:
            self._borrowers.add(task)
        return load_s

    def give_back(self, task: HeldTask) -> None:
        """Let go of what the task has borrowed, if anything."""
        if task in self._borrowers:
            self._borrowers.remove(task)
            self._models.release(task.claimed.request.model)

    def lacks(self, task: HeldTask) -> bool:
        """Whether a model has to be loaded for this task; for any thread."""
        return task not in self._borrowers and task.claimed.request.model not in self._models.loaded
