"""What a picture starts from: noise alone, or noise over another picture, all of it or where a mask is white."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PipelineFailed
from common.inputs import steps_done
from worker.pipelines.base import ImageRequest
from worker.zimage.tiling import tiles

WHITE = 128  # of 255: a mask's pixel is painted over from here on


class Kept(NamedTuple):
    """The part of another picture that stays as it is."""

    latents: Tensor  # (channels, 1, height / 8, width / 8), float32: the other picture
    noise: Tensor  # the same shape: what was laid over it at the start
    paint: Tensor  # (height / 8, width / 8), float32: 1 where it is painted over, 0 where it stays
    sigmas: tuple[float, ...]  # (steps + 1,)

    def restore(self, latents: Tensor, step: int) -> Tensor:
        """Return the latents before this step with the part that stays put back, as noisy as they are."""
        original = noised(self.latents, self.noise, self.sigmas[step])
        return (1 - self.paint) * original + self.paint * latents


class Beginning(NamedTuple):
    """Where a run stands before its first step."""

    latents: Tensor  # (channels, 1, height / 8, width / 8), float32
    step: int  # the first step of the schedule that is not left out
    kept: Kept | None


def begin(
    request: ImageRequest,
    vae: Any,
    *,
    shape: tuple[int, ...],
    sigmas: tuple[float, ...],
    device: str,
    tile_above: int | None = None,
) -> Beginning:
    """Return a run's first latents, of this shape, on the device; raises PipelineFailed where no step would be left.

    All that is random comes from one CPU generator in float32, the sample of the VAE before the noise, so that a seed
    means the same picture on every device.
    """
    generator = torch.Generator().manual_seed(request.seed)
    original = None
    if request.init_image is not None:
        original = encode(vae, request.init_image, device, generator, tile_above=tile_above)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
    if original is None:
        return Beginning(noise, 0, None)
    step = steps_left_out(request.steps, request.strength)
    kept = None
    if request.mask_image is not None:
        kept = Kept(original, noise, _paint(request.mask_image, shape).to(device), sigmas)
    return Beginning(noised(original, noise, sigmas[step]), step, kept)


def steps_left_out(steps: int, strength: float) -> int:
    """Return how many steps at the head of the schedule are left out; raises PipelineFailed where that is all."""
    left_out = steps - steps_done(steps, strength)
    if left_out >= steps:
        raise PipelineFailed(f"strength {strength} of {steps} steps leaves none; use at least {1 / steps:.2g}")
    return left_out


def noised(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return the latents at this noise level: on the straight line from the picture to the noise."""
    return sigma * noise + (1 - sigma) * latents


def encode(
    vae: Any,
    picture: NDArray[np.uint8],
    device: str,
    generator: torch.Generator | None = None,
    *,
    tile_above: int | None = None,
) -> Tensor:
    """Return the latents (channels, 1, height / 8, width / 8), float32, of a picture (height, width, 3).

    They are the mode of the VAE's distribution or, with a generator, a sample of it. A picture of more than
    `tile_above` pixels is encoded in tiles.
    """
    pixels = torch.tensor(picture[None], device=device).permute(0, 3, 1, 2)
    pixels = pixels.float().div(255).mul(2).sub(1).to(vae.dtype)
    with tiles(vae, pixels.shape[-2], pixels.shape[-1], tile_above):
        distribution = vae.encode(pixels, return_dict=False)[0]
    latents: Tensor = distribution.mode()
    if generator is not None:
        drawn = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
        latents = latents + distribution.std * drawn.to(latents)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.squeeze(0).unsqueeze(1).float()


def _paint(mask: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    """Return the mask (height, width) by its nearest pixels, at the size of latents of this shape."""
    rows, columns = mask.shape[0] // shape[-2], mask.shape[1] // shape[-1]
    return torch.tensor(mask[::rows, ::columns] >= WHITE, dtype=torch.float32)
