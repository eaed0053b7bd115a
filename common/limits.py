"""What the live workers can do with each model, by their cards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from common.cards import WorkerCard


class Limits(NamedTuple):
    """What the fleet can do with one model; None where that is not known, as no worker or not each of them says."""

    capacity: int = 0  # runs that advance together
    max_pixels: int | None = None  # of the largest picture that some worker has memory for
    loras: frozenset[str] | None = None  # in some worker's folder
    batch: int = 1  # runs that advance together on one worker, in the mean


def by_model(cards: Iterable[WorkerCard]) -> dict[str, Limits]:
    """Return the limits of each model that is served."""
    serving: dict[str, list[WorkerCard]] = {}
    for card in cards:
        for model in card.models:
            serving.setdefault(model, []).append(card)
    return {model: _limits(model, workers) for model, workers in serving.items()}


def _limits(model: str, workers: list[WorkerCard]) -> Limits:
    pixels = [card.max_pixels[model] for card in workers if model in card.max_pixels]
    loras = [card.loras for card in workers if card.loras is not None]
    taking = [card.capacity for card in workers if card.state != "draining" and not card.drained]
    return Limits(
        capacity=sum(taking),
        max_pixels=max(pixels) if len(pixels) == len(workers) else None,
        loras=frozenset().union(*loras) if len(loras) == len(workers) else None,
        batch=max(1, sum(taking) // max(1, len(taking))),
    )
