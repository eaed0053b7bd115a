"""Classifier-free guidance: away from what the negative prompt would paint."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.pipelines.base import ImageRequest


def guided_steps(request: ImageRequest, times: Tensor) -> tuple[bool, ...]:
    """Return for each of the times (steps,), on the CPU, whether that step is guided: none after the truncation."""
    wanted = request.guidance_scale > 0
    return tuple(wanted and time <= request.cfg_truncation for time in times.tolist())


def guide(positive: Tensor, negative: Tensor, *, scale: float, normalization: float) -> Tensor:
    """Return the guided prediction, p + scale (p - n), of two float32 tensors of one shape.

    A normalization above 0 shortens it to at most that many times the norm of p.
    """
    guided = positive + scale * (positive - negative)
    if normalization > 0:
        longest = torch.linalg.vector_norm(positive) * normalization
        length = torch.linalg.vector_norm(guided)
        guided = guided * torch.where(length > longest, longest / length, 1.0)  # no branch: that would stall a GPU
    return guided
