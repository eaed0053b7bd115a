"""What a picture's file is and how large it says it is, read from its head: nothing is decoded, nothing allocated."""

from __future__ import annotations

from typing import NamedTuple

from common.schemas import ImageFormat

# Markers of ITU-T T.81, table B.1: those that begin a frame, and those without a length after them
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}
_SCAN = 0xDA

MAX_JPEG_STEPS = 4096  # segments and padding before the scan; Pillow too takes each in Python, and holds up others

STORED_HEAD_BYTES = 24  # of a PNG: as much as `head` reads


class Head(NamedTuple):
    """A file's kind, and the picture's size in pixels as it is stored, before it is turned upright."""

    format: ImageFormat
    width: int
    height: int


def head(data: bytes) -> Head | None:
    """Return what a file says of itself; None where it is no PNG, JPEG or WebP, or breaks off before it says so."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def png_chunks(data: bytes, most: int) -> int:
    """Return how many chunks a PNG has, counting no further than one more than `most`."""
    at, count = 8, 0
    while count <= most and at + 12 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        count += 1
    return count


def _png(data: bytes) -> Head | None:
    if data[12:16] != b"IHDR" or len(data) < STORED_HEAD_BYTES:
        return None
    return Head("png", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))


def _jpeg(data: bytes) -> Head | None:
    """Read on to the first scan, as a decoder does; None where there is more before it than any writer has to say."""
    at, found = 2, None
    for _ in range(MAX_JPEG_STEPS):
        if at + 9 > len(data):
            return found
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == _SCAN:
            return found
        if marker in _FRAMES and found is None:
            height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
            found = Head("jpeg", int.from_bytes(width, "big"), int.from_bytes(height, "big"))
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp(data: bytes) -> Head | None:
    """The canvas of an extended file, else the one frame, lossy or lossless (RFC 9649)."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return Head("webp", 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
    if kind == b"VP8 ":
        sides = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return Head("webp", sides[0] & 0x3FFF, sides[1] & 0x3FFF)
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return Head("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    return None
