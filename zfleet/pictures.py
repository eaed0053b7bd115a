"""Pictures as files of the user's: read, or written whole or not at all where they can be."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

from common.errors import FleetError

FORMATS = {".webp": "webp", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


class CannotWrite(FleetError):
    """Raised when a picture cannot be written where the user wants it."""

    code = "cannot_write"


class CannotRead(FleetError):
    """Raised when a file of the user's cannot be read."""

    code = "cannot_read"


def read(path: Path) -> bytes:
    """Return what is in a file; raises CannotRead, naming the cause."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CannotRead(f"{path}: {_reason(error)}") from None


def format_of(path: Path) -> str | None:
    """Return the format that a file's ending asks for; None without an ending, CannotWrite for one we do not know."""
    suffix = path.suffix.lower()
    if not suffix:
        return None
    if suffix not in FORMATS:
        raise CannotWrite(f"{path}: a picture ends in {', '.join(FORMATS)}, or say which --format it is")
    return FORMATS[suffix]


def targets(path: Path, count: int) -> list[Path]:
    """Return the files of `count` pictures: out.webp alone, or out-1.webp, out-2.webp …

    Raises CannotWrite for a folder.
    """
    if count == 1:
        return [path]
    if path.is_dir():
        raise CannotWrite(f"{path} is a folder")
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def require_writable(paths: Sequence[Path]) -> None:
    """Raise CannotWrite, naming the cause, unless each of these files can be written."""
    for path in paths:
        real = Path(os.path.realpath(path))  # the picture replaces what a link points at, not the link
        try:
            mode = real.stat().st_mode
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CannotWrite(f"{path}: {_reason(error)}") from None
        else:
            if not stat.S_ISREG(mode):
                raise CannotWrite(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
            if not os.access(real, os.W_OK):
                raise CannotWrite(f"{path}: permission denied")
        probe = _beside(real)
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            if error.errno is not None and not real.parent.is_dir():
                raise CannotWrite(f"{path}: there is no folder {real.parent}") from None
            raise CannotWrite(f"{path}: {_reason(error)}") from None


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; raises CannotWrite."""
    real = Path(os.path.realpath(path))
    partial = _beside(real)
    try:
        with partial.open("xb") as file:
            file.write(data)
        partial.replace(real)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CannotWrite(f"{path}: {_reason(error)}") from None


def from_data_url(url: str) -> bytes:
    """Return the file that stands in a data: URL."""
    return base64.b64decode(url.partition(",")[2])


def _beside(path: Path) -> Path:
    """Return a name in the same folder that nothing has; short, as the target's own may be as long as names get."""
    return path.with_name(f".{uuid.uuid4().hex}.partial")


def _reason(error: OSError) -> str:
    return re.sub(r"\s+", " ", error.strerror or str(error)).lower()
