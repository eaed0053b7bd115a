"""Pictures that clients send: a handle names one, and says where it is in storage; a request names them by field."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.schemas import GenerateRequest, ResolvedRequest

FIELDS = ("init_image", "mask_image", "control_image", "reference_images")  # of a request

_HANDLE = re.compile(r"img_[0-9a-f]{32}")


def new_handle() -> str:
    """Return a handle that nobody can guess."""
    return f"img_{secrets.token_hex(16)}"


def is_handle(text: str) -> bool:
    """Return whether the text is a handle, rather than a picture in base64."""
    return _HANDLE.fullmatch(text) is not None


def storage_key(handle: str) -> str:
    """Return the key under which the picture is stored, always as PNG: upright, RGB or grey, without metadata."""
    return f"inputs/{handle}.png"


def named(request: GenerateRequest | ResolvedRequest) -> dict[str, list[str]]:
    """Return by field the pictures of a request as they stand in it; fields without any are left out."""
    values = {field: getattr(request, field) for field in FIELDS}
    return {field: [value] if isinstance(value, str) else list(value) for field, value in values.items() if value}


def steps_done(steps: int, strength: float) -> int:
    """Return how many of `steps` are done where a share of `strength` of a picture is painted over.

    Counted as diffusers' ZImageImg2ImgPipeline.get_timesteps does: rounded up, but for what floating point swallows.
    """
    return steps - int(max(steps - min(steps * strength, steps), 0))
