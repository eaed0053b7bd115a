"""Whether a picture shows its scene, by colours and outlines alone: no model judges a model here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worker.pico.scenes import (
    CENTRE_RADIUS,
    OUTLINES,
    PALETTE,
    RADIUS,
    SHAPES,
    UNSAID_BACKGROUND,
    Scene,
    Shape,
    Size,
    Thing,
)

COLOURS = tuple(PALETTE)
VALUES = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float32)
NO_COLOUR = len(COLOURS)  # the class of a pixel that is too far from every colour
FAR = 65.0  # distance in RGB; the nearest two colours are 87 apart
GRID = 48  # an outline is compared at so many pixels a side
OVERLAP = 0.7  # intersection over union that an outline needs to be one of the shapes
ASPECT = 1.4  # so much wider or higher than its outline may a shape be
LEAST = 0.01  # of its part of the picture must a thing cover to be seen
ELSE = 0.005  # of the picture may show something that is neither thing nor background
PLAIN = 0.9  # of what is around the things must be the background's colour
EDGE = 3  # pixels around a thing where its colour blends with the background's
OFF = 0.125  # of the picture's side may a thing be off its place
STRAY = 0.08  # a row or column of an outline with less than this share of the fullest one does not count

Classes = NDArray[np.intp]  # (height, width), an index into COLOURS for each pixel, or NO_COLOUR
Mask = NDArray[np.bool_]  # (height, width)
Extent = tuple[int, int, int, int]  # left, top, right, bottom; the latter two excluded


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is right about a picture, for each thing of the scene in order."""

    background: bool
    colours: tuple[bool | None, ...]  # the colour most seen where the thing should be; None where any will do
    shapes: tuple[bool, ...]
    sizes: tuple[bool, ...]
    placed: bool  # things on the right sides of each other, or one thing in its place
    alone: bool  # nothing else is to be seen

    @property
    def matches(self) -> bool:
        """Whether background, colours and places are as told, and nothing else is there; shapes and sizes may err."""
        return self.background and False not in self.colours and self.placed and self.alone


@dataclass(frozen=True, slots=True)
class _Seen:
    colour: int
    mask: Mask  # over the whole picture


def judge(picture: NDArray[np.uint8], scene: Scene) -> Judgement:
    """Compare a picture (height, width, 3) with the scene it should show."""
    classes = classify(picture)
    background = _commonest(_border(classes))
    seen = [_look(classes, background, thing) for thing in scene.things]
    pairs = list(zip(scene.things, seen, strict=True))
    around = np.ones_like(classes, dtype=np.bool_)
    for found in filter(None, seen):
        around &= ~_grow(found.mask, EDGE)
    plain = classes == background
    return Judgement(
        background=background == _index(scene.background or UNSAID_BACKGROUND)
        and bool((plain & around).sum() >= PLAIN * around.sum()),
        colours=tuple(
            None if thing.colour is None else found is not None and found.colour == _index(thing.colour)
            for thing, found in pairs
        ),
        shapes=tuple(found is not None and shape_of(found.mask) == thing.shape for thing, found in pairs),
        sizes=tuple(found is not None and _size_of(found.mask, thing) == thing.size for thing, found in pairs),
        placed=_in_order(classes, background, scene) if len(pairs) == 2 else _in_place(~plain, scene.things[0]),
        alone=bool((~plain & around).mean() <= ELSE),
    )


def classify(picture: NDArray[np.uint8]) -> Classes:
    """Return the nearest colour of the palette for each pixel, or NO_COLOUR."""
    values = picture.astype(np.float32)
    # |p − v|² = |p|² + |v|² − 2 p·v
    distances = (values**2).sum(axis=-1, keepdims=True) + (VALUES**2).sum(axis=-1) - 2 * values @ VALUES.T
    nearest: Classes = np.where(distances.min(axis=-1) > FAR**2, NO_COLOUR, distances.argmin(axis=-1))
    return nearest


def shape_of(mask: Mask) -> Shape | None:
    """Return the shape whose outline, brought to the same frame, overlaps best with the mask, if it does so well."""
    framed, aspect = _frame(mask)

    def overlap(shape: Shape) -> float:
        template, own = _template(shape)
        if not 1 / ASPECT < aspect / own < ASPECT:
            return 0.0
        return float((framed & template).sum() / max(1, (framed | template).sum()))

    best = max(SHAPES, key=overlap)
    return best if overlap(best) >= OVERLAP else None


def _look(classes: Classes, background: int, thing: Thing) -> _Seen | None:
    """Return what is seen in the thing's part of the picture, if anything."""
    left, top, right, bottom = (round(edge) for edge in thing.box(classes.shape[1], classes.shape[0]))
    part = np.zeros_like(classes, dtype=np.bool_)
    part[top:bottom, left:right] = True
    foreground = part & (classes != background)
    if foreground.sum() < LEAST * part.sum():
        return None
    inner = ~_grow(~foreground)  # without the edge, whose blend with the background may pass for other colours
    colour = _commonest(classes[inner if inner.any() else foreground])
    return _Seen(colour, foreground & _grow(classes == colour))


def _in_place(foreground: Mask, thing: Thing) -> bool:
    """Return whether all that is seen stands in the middle of the thing's part of the picture."""
    extent = _extent(foreground)
    if extent is None:
        return False
    height, width = foreground.shape
    box = thing.box(width, height)
    across = abs(extent[0] + extent[2] - box[0] - box[2]) / 2
    down = abs(extent[1] + extent[3] - box[1] - box[3]) / 2
    return bool(across < OFF * width and down < OFF * height)


def _in_order(classes: Classes, background: int, scene: Scene) -> bool:
    """Return whether the colours of two things stand as told, left to right or top to bottom."""
    foreground = classes != background
    masks = [foreground & (classes == _index(thing.colour)) if thing.colour else foreground for thing in scene.things]
    if any(mask.mean() < LEAST / 2 for mask in masks):
        return False
    axis = 1 if scene.things[0].place == "left" else 0
    first, second = (float(np.nonzero(mask)[axis].mean()) / classes.shape[axis] for mask in masks)
    return bool(second - first > 2 * OFF)


def _size_of(mask: Mask, thing: Thing) -> Size | None:
    """Return the size whose radius is nearest, by the area that the mask covers."""
    left, top, right, bottom = thing.box(mask.shape[1], mask.shape[0])
    side = min(right - left, bottom - top)
    radius = float(np.sqrt(mask.sum() / _area(thing.shape)))
    radii = CENTRE_RADIUS if thing.place == "centre" else RADIUS
    return min(radii, key=lambda size: abs(radii[size] * side - radius))


@cache
def _area(shape: Shape) -> float:
    """Return the area inside a shape's outline, by the shoelace formula."""
    points = np.array(OUTLINES[shape])
    x, y = points[:, 0], points[:, 1]
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def _extent(mask: Mask) -> Extent | None:
    """Return the smallest frame around the mask, stray pixels aside."""
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    ys, xs = np.nonzero(rows > STRAY * rows.max())[0], np.nonzero(columns > STRAY * columns.max())[0]
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(ys) else None


def _frame(mask: Mask) -> tuple[Mask, float]:
    """Return the mask cut to its extent and brought to GRID x GRID, and how wide it was for its height."""
    extent = _extent(mask)
    if extent is None:
        return np.zeros((GRID, GRID), dtype=np.bool_), 1.0
    left, top, right, bottom = extent
    cut = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    framed: Mask = np.asarray(cut.resize((GRID, GRID), Image.Resampling.BILINEAR)) > 127
    return framed, (right - left) / (bottom - top)


@cache
def _template(shape: Shape) -> tuple[Mask, float]:
    canvas = Image.new("L", (200, 200))
    ImageDraw.Draw(canvas).polygon([(100 + 80 * x, 100 + 80 * y) for x, y in OUTLINES[shape]], fill=255)
    return _frame(np.asarray(canvas) > 127)


def _border(classes: Classes) -> Classes:
    """Return the pixels along the four edges."""
    depth = max(1, min(classes.shape) // 32)
    edges = (classes[:depth], classes[-depth:], classes[:, :depth], classes[:, -depth:])
    return np.concatenate([edge.ravel() for edge in edges])


def _commonest(classes: Classes) -> int:
    return int(np.bincount(classes.ravel()).argmax())


def _index(colour: str) -> int:
    return COLOURS.index(colour)


def _grow(mask: Mask, pixels: int = 1) -> Mask:
    """Return the mask with so many more pixels on every side."""
    height, width = mask.shape
    padded = np.pad(mask, pixels)
    span = range(2 * pixels + 1)
    tall = np.logical_or.reduce([padded[shift : shift + height] for shift in span])
    wide: Mask = np.logical_or.reduce([tall[:, shift : shift + width] for shift in span])
    return wide
