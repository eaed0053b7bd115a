"""The tiles in which the VAE decodes and encodes large pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

OVERLAP = 0.25  # of a tile's side, over which it fades into the next


@contextmanager
def tiles(vae: Any, height: int, width: int, tile_above: int | None) -> Iterator[None]:
    """Have the VAE work in tiles within, where a picture of this size is above so many pixels."""
    if tile_above is None or height * width <= tile_above:
        yield
        return
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = tile_side(height // factor, width // factor, isqrt(tile_above) // factor)
    vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * factor
    vae.tile_overlap_factor = OVERLAP
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def tile_side(rows: int, columns: int, largest: int) -> int:
    """Return the side of the square tiles that cover so many latents, at most `largest`, a multiple of 4.

    Of the sides from half of that on it is the one that leaves the least narrow tiles at the far edges: the VAE
    normalizes over a tile, and a narrow strip has a brightness of its own.
    """
    largest = max(largest // 4 * 4, 8)
    sides = range(largest, max(largest // 8 * 4, 8) - 1, -4)
    return max(sides, key=lambda side: min(_last(rows, side), _last(columns, side)))


def _last(length: int, side: int) -> int:
    """How long the last of the tiles along an axis is: each begins three quarters of a side after the one before."""
    stride = side - side // 4
    return (length - 1) % stride + 1
