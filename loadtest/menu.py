"""What the users ask for: a small table of shapes, formats and priorities, each with its weight. Knows no locust."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

T = TypeVar("T")

# Width and height as shares of the model's default side, and how often each is asked for.
SHAPES: Sequence[tuple[tuple[float, float], int]] = (
    ((1.0, 1.0), 6),
    ((0.75, 1.0), 2),
    ((1.0, 0.75), 2),
    ((0.5, 1.0), 1),
    ((0.5, 0.5), 1),
)
FORMATS: Sequence[tuple[str, int]] = (("webp", 6), ("png", 2), ("jpeg", 2))
PRIORITIES: Sequence[tuple[str, int]] = (("normal", 16), ("high", 3), ("low", 1))

SUBJECTS = ("a red fox", "ein alter Leuchtturm", "雨夜的街道", "una plaza vacía", "два кота", "a bowl of noodles")
STYLES = ("in watercolour", "as a woodcut", "photographed at dusk", "水墨画", "isometric, on white", "in 8-bit pixels")
LONG_SHARE = 0.1  # of the prompts are a paragraph rather than a phrase
LONG_REPEATS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What GET /api/models says of the model to ask for; sizes in pixels."""

    name: str
    width: int
    height: int
    min_side: int
    max_side: int
    max_pixels: int
    size_multiple: int

    @classmethod
    def read(cls, models: Sequence[Mapping[str, Any]], name: str = "") -> Self:
        """Return the limits of the model of this name, or of the default; raises LookupError where there is none."""
        for model in models:
            if model["name"] == name or (not name and model["default"]):
                return cls(**{field: model[field] for field in cls.__dataclass_fields__})
        offered = ", ".join(str(model["name"]) for model in models) or "none"
        raise LookupError(f"the gateway has no model {name!r}; it has: {offered}")


def order(rng: random.Random, limits: Limits) -> dict[str, Any]:
    """Return the body of a submit within the model's limits."""
    width, height = _fit(_pick(rng, SHAPES), limits)
    return {
        "prompt": prompt(rng),
        "model": limits.name,
        "width": width,
        "height": height,
        "format": _pick(rng, FORMATS),
        "priority": _pick(rng, PRIORITIES),
        "metadata": {"source": "loadtest"},
    }


def prompt(rng: random.Random) -> str:
    """Return a prompt that no cache has seen: one phrase, now and then a paragraph, in several scripts."""
    phrase = f"{rng.choice(SUBJECTS)}, {rng.choice(STYLES)}, no. {rng.randrange(1_000_000)}"
    return "; ".join([phrase] * LONG_REPEATS) if rng.random() < LONG_SHARE else phrase


def _pick(rng: random.Random, table: Sequence[tuple[T, int]]) -> T:
    return rng.choices([entry for entry, _ in table], [weight for _, weight in table])[0]


def _fit(shape: tuple[float, float], limits: Limits) -> tuple[int, int]:
    """Return width and height near this share of the default size, as the model allows."""
    width, height = shape[0] * limits.width, shape[1] * limits.height
    shrink = min(1.0, math.sqrt(limits.max_pixels / (width * height)))
    return _side(width * shrink, limits), _side(height * shrink, limits)


def _side(pixels: float, limits: Limits) -> int:
    multiple = limits.size_multiple
    lowest, highest = math.ceil(limits.min_side / multiple), limits.max_side // multiple
    return multiple * min(max(int(pixels) // multiple, lowest), highest)
