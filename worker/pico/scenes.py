"""The world that pico knows: one or two flat shapes on a plain background, drawn and described in words.

A scene says all that its captions say, so a picture can be checked against its prompt: see `judge`.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Shape = Literal["circle", "square", "triangle", "star", "heart"]
Size = Literal["big", "small"]
Place = Literal["centre", "left", "right", "top", "bottom"]
Language = Literal["en", "zh"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Point = tuple[float, float]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "heart")
LANGUAGES: tuple[Language, ...] = ("en", "zh")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (35, 155, 65),
    "blue": (35, 85, 215),
    "purple": (125, 45, 170),
    "pink": (250, 150, 195),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
}
UNSAID_BACKGROUND = "white"  # of a prompt that names none

RADIUS: dict[Size | None, float] = {"big": 0.43, None: 0.34, "small": 0.25}  # of the shorter side of a half picture
CENTRE_RADIUS: dict[Size | None, float] = {"big": 0.37, None: 0.28, "small": 0.19}  # of the whole one's
JITTER = 0.015  # of the box, either way: words nearly settle the picture, so that a small network can learn them
STRETCH = 0.02  # of the radius, either way
SUPERSAMPLE = 3
HELD_OUT = 8  # one combination in so many is kept out of training


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. Its size or colour is None where no word is said about it: middling, and any colour."""

    shape: Shape
    colour: str | None
    size: Size | None = None
    place: Place = "centre"

    def box(self, width: int, height: int) -> Box:
        """Return the part of a picture of this size (pixels) in whose middle the thing stands; big ones reach out."""
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        match self.place:
            case "left":
                right /= 2
            case "right":
                left = right / 2
            case "top":
                bottom /= 2
            case "bottom":
                top = bottom / 2
        return left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing, or two that stand left and right or top and bottom, in that order."""

    things: tuple[Thing, ...]
    background: str | None = None  # a colour; None where no word is said about it

    @property
    def held_out(self) -> bool:
        """Whether this combination, of two things or of one and its background, is kept out of training."""
        told = [f"{thing.colour} {thing.shape}" for thing in self.things]
        if len(told) == 1:
            told.append(self.background or UNSAID_BACKGROUND)
        return zlib.crc32(" ".join(told).encode()) % HELD_OUT == 0


def invent(rng: random.Random) -> Scene:
    """Return a scene of any combination; its colours can be told apart."""
    background = None if rng.random() < 0.12 else rng.choice(list(PALETTE))
    free = [colour for colour in PALETTE if colour != (background or UNSAID_BACKGROUND)]
    colours = rng.sample(free, 2)
    pair = rng.random() < 0.65
    places: Sequence[Place]
    if pair:
        places = ("left", "right") if rng.random() < 0.55 else ("top", "bottom")
    else:
        places = (rng.choice(("left", "right", "top", "bottom")),) if rng.random() < 0.35 else ("centre",)
    unsaid = not pair and rng.random() < 0.15
    things = (
        Thing(rng.choice(SHAPES), None if unsaid else colour, rng.choice(("big", "small", None, None)), place)
        for colour, place in zip(colours, places, strict=False)
    )
    return Scene(tuple(things), background)


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """Return the scene as an RGB picture; `rng` moves and scales each thing a little."""
    background = scene.background or UNSAID_BACKGROUND
    free = [colour for colour in PALETTE if colour != background]
    canvas = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), PALETTE[background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        left, top, right, bottom = (edge * SUPERSAMPLE for edge in thing.box(width, height))
        radii = CENTRE_RADIUS if thing.place == "centre" else RADIUS
        radius = radii[thing.size] * min(right - left, bottom - top) * rng.uniform(1 - STRETCH, 1 + STRETCH)
        x = (left + right) / 2 + rng.uniform(-JITTER, JITTER) * (right - left)
        y = (top + bottom) / 2 + rng.uniform(-JITTER, JITTER) * (bottom - top)
        outline = [(x + radius * u, y + radius * v) for u, v in OUTLINES[thing.shape]]
        pen.polygon(outline, fill=PALETTE[thing.colour or rng.choice(free)])
    return canvas.resize((width, height), Image.Resampling.BOX)


def _ring(count: int, *radii: float) -> list[Point]:
    """Return points around the origin, the first one at the top, their radii by turns."""
    angles = ((step / count - 0.25) * math.tau for step in range(count))
    return [(math.cos(a) * radii[i % len(radii)], math.sin(a) * radii[i % len(radii)]) for i, a in enumerate(angles)]


def _heart(count: int) -> list[Point]:
    """Return the heart curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, brought to the unit square."""
    points = []
    for t in (step / count * math.tau for step in range(count)):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3 * 1.02, -(y + 2.5) / 15))
    return points


OUTLINES: dict[Shape, list[Point]] = {  # y grows downwards; a radius of about 1, areas alike
    "circle": _ring(48, 0.98),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.08, 0.86), (-1.08, 0.86)],
    "star": _ring(10, 1.16, 0.5),
    "heart": _heart(64),
}
