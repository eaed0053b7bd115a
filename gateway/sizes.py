"""Sizes of pictures: what a model allows, and what a client gets who names none."""

from __future__ import annotations

import math

from common.errors import FieldError
from common.models import SIZE_MULTIPLE, ModelSpec
from common.schemas import GenerateRequest

Size = tuple[int, int]  # width and height in pixels


def errors(width: int, height: int, spec: ModelSpec) -> list[FieldError]:
    """Return what is wrong with a picture's size in pixels, if anything."""
    wanted = f"must be a multiple of {SIZE_MULTIPLE} from {spec.min_side} to {spec.max_side} for model {spec.name}"
    found = [
        FieldError(name, wanted)
        for name, side in (("width", width), ("height", height))
        if side % SIZE_MULTIPLE or not spec.min_side <= side <= spec.max_side
    ]
    if not found and width * height > spec.max_pixels:
        found.append(FieldError("width", f"width x height must be at most {spec.max_pixels} pixels for {spec.name}"))
    return found


def chosen(request: GenerateRequest, spec: ModelSpec, like: Size | None = None, max_pixels: int | None = None) -> Size:
    """Return the size that is asked for, else that of the picture it is to be `like`, else the model's.

    A size that is taken from a picture keeps its shape as well as the model, and the workers' `max_pixels`, let it.
    """
    if like is None or (request.width is not None and request.height is not None):
        wide = spec.width if request.width is None else request.width
        return wide, spec.height if request.height is None else request.height
    width, height = like
    most = min(spec.max_pixels, max_pixels or spec.max_pixels)
    if request.width is not None:
        return request.width, _side(request.width * height / width, spec, most // max(1, request.width))
    if request.height is not None:
        return _side(request.height * width / height, spec, most // max(1, request.height)), request.height
    return fitted(width, height, spec, most)


def fitted(width: int, height: int, spec: ModelSpec, max_pixels: int) -> Size:
    """Return a size that the model allows, as near as may be to this one: scaled where it has to be, its shape kept.

    A shape that is too narrow for the model becomes broader.
    """
    scale = min(1.0, spec.max_side / max(width, height), math.sqrt(max_pixels / (width * height)))
    scale = max(scale, spec.min_side / min(width, height))
    shorter = _side(min(width, height) * scale, spec, math.isqrt(max_pixels))
    longer = _side(max(width, height) * scale, spec, max_pixels // shorter)
    return (longer, shorter) if width >= height else (shorter, longer)


def _side(length: float, spec: ModelSpec, most: int) -> int:
    """Return the nearest multiple of SIZE_MULTIPLE that is a side of this model's, and at most `most` if one is."""
    lowest = math.ceil(spec.min_side / SIZE_MULTIPLE)
    highest = min(spec.max_side, most) // SIZE_MULTIPLE
    return SIZE_MULTIPLE * max(lowest, min(highest, round(length / SIZE_MULTIPLE)))
