"""Pictures that clients send: a handle names one, and says where it is in storage."""

from __future__ import annotations

import re
import secrets

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
