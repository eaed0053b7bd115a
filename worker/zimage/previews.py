"""Small pictures of what a run is going to show, from its latents by a linear map: nothing is decoded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, pad

LONGEST = 128  # pixels
SAMPLES = 24
SAMPLE_SIDE = 128  # pixels


class Previews:
    """Draws previews for one VAE; the map is fitted to it when the first is asked for."""

    def __init__(self, vae: Any, device: str) -> None:
        self._vae = vae
        self._device = device
        self._map: Tensor | None = None  # (channels + 1, 3): from latents and a 1 to red, green and blue in 0..1

    def draw(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return the preview (rows, columns, 3) of clean latents (channels, 1, height / 8, width / 8).

        A pixel for each latent, or one for several where that would be more than LONGEST along a side.
        """
        if self._map is None:
            self._map = fit(self._vae, self._device)
        colours = (_with_one(latents.squeeze(1).float()) @ self._map).permute(2, 0, 1)
        scale = min(1.0, LONGEST / max(colours.shape[-2:]))
        rows, columns = (max(1, round(side * scale)) for side in colours.shape[-2:])
        small = adaptive_avg_pool2d(colours, (rows, columns)) if scale < 1 else colours
        array: NDArray[np.uint8] = (
            small.permute(1, 2, 0).clamp(0, 1).mul(255).round().to(torch.uint8).contiguous().cpu().numpy()
        )
        return array


def predicted(latents: Tensor, before: Tensor, *, sigma: float, delta: float) -> Tensor:
    """Return the clean latents that the last step was heading for.

    That step went from `before` to `latents` by `delta` of sigma, along v, and sigma is what is left: x - sigma v.
    """
    return latents - (sigma / delta) * (latents - before)


@torch.inference_mode()
def fit(vae: Any, device: str) -> Tensor:
    """Return the linear map (channels + 1, 3), on the device, from latents as a pipeline holds them to RGB in 0..1.

    Least squares over pictures drawn from a seed, from the latents that the VAE encodes them to, to the mean colour of
    the pixels that each latent stands for.
    """
    pictures = samples()
    encoded = [
        vae.encode((picture * 2 - 1).unsqueeze(0).to(device, vae.dtype)).latent_dist.mode() for picture in pictures
    ]
    latents = (torch.cat(encoded).float() - vae.config.shift_factor) * vae.config.scaling_factor
    colours = avg_pool2d(pictures, SAMPLE_SIDE // latents.shape[-1])
    inputs = torch.cat([_with_one(one).flatten(0, 1) for one in latents]).cpu()
    solution: Tensor = torch.linalg.lstsq(inputs, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution
    return solution.to(device)


def samples() -> Tensor:
    """Return pictures (SAMPLES, 3, side, side) in 0..1, in equal parts gradients, blocks of colour, and soft noise."""
    generator = torch.Generator().manual_seed(0)

    def grid(cells: int, mode: str) -> Tensor:
        drawn = torch.rand((SAMPLES // 3, 3, cells, cells), generator=generator)
        corners = {"align_corners": True} if mode == "bilinear" else {}
        return interpolate(drawn, size=(SAMPLE_SIDE, SAMPLE_SIDE), mode=mode, **corners)

    return torch.cat([grid(2, "bilinear"), grid(4, "nearest"), grid(math.isqrt(SAMPLE_SIDE), "bilinear")])


def _with_one(latents: Tensor) -> Tensor:
    """Return (channels, rows, columns) as (rows, columns, channels + 1), a 1 behind the channels."""
    return pad(latents.permute(1, 2, 0), (0, 1), value=1.0)
