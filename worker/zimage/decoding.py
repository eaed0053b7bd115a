"""From latents to pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from worker.zimage.tiling import tiles


def decode(vae: Any, latents: Tensor, *, tile_above: int | None = None) -> Tensor:
    """Return the picture of latents (channels, 1, height / 8, width / 8) as float32 in 0..1, (height, width, 3).

    One of more than `tile_above` pixels is decoded in tiles.
    """
    latents = latents.squeeze(1).unsqueeze(0).to(vae.dtype)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with tiles(vae, latents.shape[-2] * factor, latents.shape[-1] * factor, tile_above):
        decoded: Tensor = vae.decode(latents, return_dict=False)[0]
    # widened first: halving in bfloat16 would leave the bright half of the range with 128 levels
    return decoded.squeeze(0).permute(1, 2, 0).float().mul(0.5).add(0.5).clamp(0, 1)
