"""Memory for pictures: how much there is, and how large a picture fits into it. What one takes, its pipeline says."""

from __future__ import annotations

from common.models import SIZE_MULTIPLE, ModelSpec
from worker.pipelines.base import MIB, BasePipeline, ImageRequest

CUDA_CONTEXT = 512 * MIB  # what the driver takes for a process's kernels and streams, beside torch's own memory


def budget_bytes(*, device: str, total: int | None = None, others: int = 0, limit: int | None = None) -> int | None:
    """Return the bytes that models, what they keep, and pictures may take together; None where nothing bounds them.

    `total` is the device's memory, of which `others`, other processes, have theirs; None where it does not say, as on a
    CPU. `limit` is what this worker may use of it.
    """
    bounds = [] if total is None else [total - others]
    if limit is not None:
        bounds.append(limit)
    if not bounds:
        return None
    context = CUDA_CONTEXT if device == "cuda" else 0
    return max(0, min(bounds) - context)


def largest_picture(pipeline: BasePipeline, spec: ModelSpec, budget: int | None) -> int:
    """Return the pixels, width x height, of the largest picture that fits the budget alone; 0 if none does.

    It asks what a picture takes at least, of the shortest prompt and without guidance: a task above is one that can
    never fit. Sides differ by one multiple of 16 at most; where the largest within the model's limits fits, all do.
    """

    def fits(step: int) -> bool:
        width, height = _sides(step)
        asked = ImageRequest(prompt="", width=width, height=height, steps=1, guidance_scale=0.0, seed=0)
        return budget is None or pipeline.peak_bytes([asked]) <= budget

    least, most = 2 * (spec.min_side // SIZE_MULTIPLE), 2 * (spec.max_side // SIZE_MULTIPLE)
    while most > least and _pixels(most) > spec.max_pixels:
        most -= 1
    if fits(most):
        return spec.max_pixels
    if not fits(least):
        return 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return _pixels(least)


def _sides(step: int) -> tuple[int, int]:
    return (step + 1) // 2 * SIZE_MULTIPLE, step // 2 * SIZE_MULTIPLE


def _pixels(step: int) -> int:
    width, height = _sides(step)
    return width * height
