"""Instruction editing: reference pictures beside the prompt, as an Omni checkpoint reads them."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.errors import PipelineFailed
from common.models import SIZE_MULTIPLE
from worker.pipelines.base import ImageRequest
from worker.zimage.inputs import encode
from worker.zimage.shape import TOKEN_MULTIPLE

LEAST_SIDE = 64  # pixels of a reference picture
MOST_ASPECT = 8  # its longer side over its shorter one
MOST_PIXELS = 1024 * 1024  # a larger one is brought to the size of the picture asked for


class References(NamedTuple):
    """Reference pictures, ready for the transformer: in its dtype and on its device."""

    latents: tuple[Tensor, ...]  # (channels, 1, height / 8, width / 8) each
    features: tuple[Tensor, ...]  # (rows, columns, SigLIP's width) each


def prepare_references(
    request: ImageRequest, parts: Any, device: str, *, tile_above: int | None = None
) -> References | None:
    """Return what the transformer reads of the reference pictures, or None where there are none.

    Raises PipelineFailed for a picture whose size it cannot read.
    """
    if not request.reference_images:
        return None
    dtype = parts.transformer.dtype
    pictures = [_fitted(picture, request.width * request.height) for picture in request.reference_images]
    features = tuple(_features(parts, picture, device).to(dtype) for picture in pictures)
    latents = (encode(parts.vae, _cropped(picture), device, tile_above=tile_above) for picture in pictures)
    return References(tuple(latent.to(dtype) for latent in latents), features)


def check_room(axes_lens: Sequence[int], pieces: Sequence[Tensor], references: References | None) -> None:
    """Raise PipelineFailed where a position would be past the rotary tables (frames, rows, columns).

    On a GPU that would be a device-side assert, which ends the whole CUDA context.
    """
    frames, rows, columns = axes_lens
    position = 1
    for piece in pieces:
        if position + len(piece) + -len(piece) % TOKEN_MULTIPLE > frames:
            raise PipelineFailed("the prompt is too long beside its reference pictures; shorten it, or send fewer")
        position += len(piece) + 2  # one for the picture's latents, one for its features
    for latents in references.latents if references else ():
        # the features' rows and columns are counted in latents, not in patches
        if latents.shape[-2] > rows or latents.shape[-1] > columns:
            size = f"{latents.shape[-1] * 8}x{latents.shape[-2] * 8}"
            raise PipelineFailed(
                f"a reference picture of {size} is larger than {columns * 8}x{rows * 8}; send a smaller one"
            )


def _fitted(picture: NDArray[np.uint8], pixels: int) -> Image.Image:
    """Return the picture, brought to about so many pixels where it is a large one."""
    image = Image.fromarray(picture)
    short, long = sorted(image.size)
    if short < LEAST_SIDE or long > MOST_ASPECT * short:
        raise PipelineFailed(
            f"a reference picture of {image.width}x{image.height} cannot be read; send one of at least {LEAST_SIDE} "
            f"pixels a side, the longer at most {MOST_ASPECT} times the shorter"
        )
    if image.width * image.height <= MOST_PIXELS:
        return image
    scale = sqrt(pixels / (image.width * image.height))
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)


def _features(parts: Any, image: Image.Image, device: str) -> Tensor:
    """Return what SigLIP sees in the picture: (rows, columns, its width)."""
    inputs = parts.siglip_processor(images=[image], return_tensors="pt")
    rows, columns = inputs["spatial_shapes"][0].tolist()
    states = parts.siglip(**inputs.to(device), return_dict=True).last_hidden_state
    features: Tensor = states[0, : rows * columns].unflatten(0, (rows, columns))
    return features


def _cropped(image: Image.Image) -> NDArray[np.uint8]:
    """Return the middle of the picture, in whole patches of the transformer."""
    width, height = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]
