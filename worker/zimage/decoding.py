"""From latents to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

from torch import Tensor

OVERLAP = 0.25  # of a tile's side, over which it fades into the next


def decode(vae: Any, latents: Tensor, *, tile_above: int | None = None) -> Tensor:
    """Return the picture of latents (channels, 1, height / 8, width / 8) as float32 in 0..1, (height, width, 3).

    One of more than `tile_above` pixels is decoded in tiles.
    """
    latents = latents.squeeze(1).unsqueeze(0).to(vae.dtype)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    with tiles(vae, latents.shape[-2], latents.shape[-1], tile_above):
        decoded: Tensor = vae.decode(latents, return_dict=False)[0]
    # widened first: halving in bfloat16 would leave the bright half of the range with 128 levels
    return decoded.squeeze(0).permute(1, 2, 0).float().mul(0.5).add(0.5).clamp(0, 1)


@contextmanager
def tiles(vae: Any, rows: int, columns: int, tile_above: int | None) -> Iterator[None]:
    """Have the VAE work in tiles within, where so many rows and columns of latents are above `tile_above` pixels."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if tile_above is None or rows * columns * factor**2 <= tile_above:
        yield
        return
    side = tile_side(rows, columns, isqrt(tile_above) // factor)
    vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * factor
    vae.tile_overlap_factor = OVERLAP
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def tile_side(rows: int, columns: int, largest: int) -> int:
    """Return the side of the square tiles that cover so many latents, at most `largest`, a multiple of 4.

    Of the sides from half of that on it is the one that leaves the least narrow tiles at the far edges: the decoder
    normalizes over a tile, and a narrow strip has a brightness of its own.
    """
    largest = max(largest // 4 * 4, 8)
    sides = range(largest, max(largest // 8 * 4, 8) - 1, -4)
    return max(sides, key=lambda side: min(_last(rows, side), _last(columns, side)))


def _last(length: int, side: int) -> int:
    """How long the last of the tiles along an axis is: each begins three quarters of a side after the one before."""
    stride = side - side // 4
    return (length - 1) % stride + 1
