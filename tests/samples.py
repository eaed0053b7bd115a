"""Pictures as files, for tests that send them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def drawn(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """A smooth picture whose four corners differ: red, green, blue and white."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], float)
    pixels = (
        corners[0, 0] * ((1 - down) * (1 - across))[..., None]
        + corners[0, 1] * ((1 - down) * across)[..., None]
        + corners[1, 0] * (down * (1 - across))[..., None]
        + corners[1, 1] * (down * across)[..., None]
    )
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    out = io.BytesIO()
    (image or drawn()).save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG that no compression makes smaller than its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encoded(Image.fromarray(pixels), compress_level=0)


def lying_png(width: int, height: int) -> bytes:
    """A small PNG whose head claims another size."""
    data = encoded()
    head = struct.pack(">II", width, height) + data[24:29]
    return data[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:]
