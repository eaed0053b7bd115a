"""From pixels to files: WebP, PNG or JPEG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.schemas import ImageFormat


def encode(pixels: NDArray[np.uint8], image_format: ImageFormat, quality: int) -> bytes:
    """Return the picture of shape (height, width, 3) as a file's bytes; `quality` (1 to 100) is for WebP and JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=3)  # level 6 takes three times as long for a few per cent
    else:
        image.save(buffer, image_format.upper(), quality=quality)
    return buffer.getvalue()
