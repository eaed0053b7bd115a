"""Small files that would become very large: refused before they do, at the cost of next to nothing."""

from __future__ import annotations

import base64
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from gateway.pictures import Unusable, canonical, from_text
from tests.samples import drawn, encoded, lying_png

LIMIT = 1 << 20
WITHIN_BYTES = 80 << 20  # Pillow stops at 64 MiB of texts, and counts no pixels among them
WITHIN_S = 3.0
MIB = 1 << 20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG with these after its head."""
    data = encoded(kind="PNG")
    return data[:33] + b"".join(chunks) + data[33:]


HUGE, FULL = (zlib.compress(bytes(size), 1) for size in (100 * MIB, MIB - 1))


def animated(frames: int) -> bytes:
    """A WebP of so many frames, each the same."""
    still = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    frame = struct.pack("<3s3s3s3s3sB", bytes(3), bytes(3), b"\x0f\0\0", b"\x0f\0\0", b"\x01\0\0", 0) + still
    part = b"ANMF" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)
    head = b"VP8X" + struct.pack("<IB3s3s3s", 10, 2, bytes(3), b"\x0f\0\0", b"\x0f\0\0")
    body = b"WEBP" + head + b"ANIM" + struct.pack("<IIH", 6, 0, 0) + part * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose marker says this size."""
    data = bytearray(encoded(kind="JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def cost(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes of Python's memory at the most."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        call()
    except Unusable:
        pass
    finally:
        took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return took, peak


BOMBS = {
    "png-of-billions-of-pixels": lying_png(50_000, 50_000),
    "png-rows-that-never-end": with_chunks(chunk(b"IDAT", HUGE)),
    "png-ztxt": with_chunks(chunk(b"zTXt", b"a\0\0" + HUGE)),
    "png-ztxts": with_chunks(*[chunk(b"zTXt", b"a%d\0\0" % n + FULL) for n in range(500)]),
    "png-itxt": with_chunks(chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE)),
    "png-itxts": with_chunks(*[chunk(b"iTXt", b"a%d\0\1\0\0\0" % n + FULL) for n in range(500)]),
    "png-iccp": with_chunks(chunk(b"iCCP", b"a\0\0" + HUGE)),
    "png-large-text": with_chunks(chunk(b"tEXt", b"a\0" + b"x" * 8 * MIB)),
    "webp-of-many-frames": animated(20_000),
    "jpeg-65535": jpeg_of(65_535, 65_535),
    "jpeg-wider-than-its-data": jpeg_of(1024, 1024),
    "jpeg-without-a-height": jpeg_of(48, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_it_costs_next_to_nothing(name: str) -> None:
    took, peak = cost(lambda: canonical(BOMBS[name], LIMIT))
    assert peak < WITHIN_BYTES and took < WITHIN_S


@pytest.mark.parametrize("name", sorted(BOMBS.keys() - {"png-large-text", "webp-of-many-frames"}))
def test_it_is_refused_or_made_into_a_small_picture(name: str) -> None:
    try:
        made = canonical(BOMBS[name], LIMIT)
    except Unusable:
        return
    assert made.width * made.height <= LIMIT and len(made.png) < 4 * LIMIT


def test_of_thousands_of_frames_one_is_decoded() -> None:
    made = canonical(animated(20_000), LIMIT)
    assert (made.width, made.height) == (16, 16)


def test_a_frame_larger_than_its_canvas_is_refused() -> None:
    data = bytearray(animated(1))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    with pytest.raises(Unusable):
        canonical(bytes(data), LIMIT)


def test_a_data_url_in_a_data_url_is_no_picture() -> None:
    text = "data:image/png;base64," + base64.b64encode(encoded(drawn())).decode()
    for _ in range(3):
        text = "data:image/png;base64," + base64.b64encode(text.encode()).decode()
    with pytest.raises(Unusable, match="is no PNG, JPEG or WebP"):
        canonical(from_text(text), LIMIT)


def test_a_data_url_with_a_long_head_is_not_searched_without_end() -> None:
    took, _ = cost(lambda: from_text("data:" + "a;" * 8_000_000 + "base64,AAAA"))
    assert took < WITHIN_S


def test_the_samples_are_what_they_say() -> None:
    with Image.open(io.BytesIO(animated(5))) as image:
        assert getattr(image, "n_frames", 1) == 5
    assert len(BOMBS["png-ztxt"]) < MIB
