"""Which runs share the next step, where not all can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from common.histograms import BATCH_SIZES, Bounds
from worker.held import Picture
from worker.loans import Models

BOUNDS = Bounds(BATCH_SIZES)


class Batches:
    """Runs of one model that can share a step are a group. Groups take turns, a new one behind those that wait."""

    def __init__(self, models: Models, limits: Mapping[str, int]) -> None:
        """`limits` says for each model how many runs may advance together."""
        self._models = models
        self._limits = limits
        self._line: list[Hashable] = []  # groups, the one that waits longest first
        self._sizes: dict[tuple[str, int], int] = {}  # by model and pictures: batches

    def next(self, active: Sequence[Picture]) -> list[Picture]:
        """Return the pictures, of those in the making, that advance now: none only where there are none."""
        groups: dict[Hashable, list[Picture]] = {}
        for picture in active:
            groups.setdefault((picture.model, self._models.pipeline(picture.model).batch_key(picture.run)), []).append(
                picture
            )
        if not groups:
            return []
        waiting = [group for group in self._line if group in groups]
        first, *others = waiting + [group for group in groups if group not in waiting]
        self._line = [*others, first]
        model = groups[first][0].model
        batch = groups[first][: self._limits[model]]
        self._sizes[model, len(batch)] = self._sizes.get((model, len(batch)), 0) + 1
        return batch

    def counts(self) -> dict[str, int]:
        """Return a histogram of the batches' sizes by model, named as lua/_counts.lua has it. Any thread may ask."""
        found: Counter[str] = Counter()
        for (model, size), batches in self._sizes.copy().items():
            found[f"batch|{model}|{BOUNDS.of(size)}"] += batches
            found[f"batch|{model}|sum"] += batches * size
        return found
