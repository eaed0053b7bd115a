"""The noise levels that a picture passes through."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from common.models import SIZE_MULTIPLE


def schedule(scheduler: Any, *, width: int, height: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return a run's sigmas (steps + 1,) from noise to picture, and the transformer's times (steps,); on the CPU.

    Sigmas fall evenly from 1 to 1/steps before the scheduler shifts them. `mu` matters only to a checkpoint that
    shifts by size: it grows linearly with the number of image tokens between the two points of its config.
    """
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    config = own.config
    tokens = (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    even = torch.linspace(1.0, 1 / steps, steps).tolist()
    own.set_timesteps(sigmas=even, mu=mu, device="cpu")
    return own.sigmas, (1000 - own.timesteps) / 1000
