"""Pictures that clients send: a handle names one, and says where it is in storage; a request names them by field."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.schemas import GenerateRequest, ResolvedRequest

FIELDS = ("init_image", "mask_image", "control_image", "reference_images")  # of a request

RANDOM_BYTES = 12  # of a handle
MARK_CHARS = 8

_HANDLE = re.compile(r"img_[0-9a-f]{32}")


def new_handle(tenant: str) -> str:
    """Return a handle that nobody can guess, marked as this tenant's: img_, 24 random hex digits and 8 of the mark."""
    random = secrets.token_hex(RANDOM_BYTES)
    return f"img_{random}{_mark(tenant, random)}"


def belongs(handle: str, tenant: str) -> bool:
    """Return whether the handle was given to this tenant. One that was made up for it names a picture nobody stored."""
    random = handle.removeprefix("img_")[: 2 * RANDOM_BYTES]
    return is_handle(handle) and handle.endswith(_mark(tenant, random))


def _mark(tenant: str, random: str) -> str:
    return hashlib.sha256(f"{tenant} {random}".encode()).hexdigest()[:MARK_CHARS]


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
