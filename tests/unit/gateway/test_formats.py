from __future__ import annotations

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gateway import pictures
from gateway.formats import STORED_HEAD_BYTES, head
from tests.samples import drawn, encoded, lying_png

KINDS = {
    "png": encoded(kind="PNG"),
    "jpeg": encoded(kind="JPEG"),
    "progressive": encoded(kind="JPEG", progressive=True),
    "jpeg with a long head": encoded(kind="JPEG", exif=Image.Exif().tobytes(), comment=b"x" * 60_000),
    "webp": encoded(kind="WEBP"),
    "webp lossless": encoded(kind="WEBP", lossless=True),
    "webp with alpha": encoded(drawn(mode="RGBA"), "WEBP", exif=b"Exif\0\0"),
    "webp animated": encoded(kind="WEBP", save_all=True, append_images=[drawn(mode="L").convert("RGB")]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_files_head_says_what_it_is_and_how_large(name: str) -> None:
    found = head(KINDS[name])
    assert found is not None
    assert (found.width, found.height) == (48, 32) == Image.open(io.BytesIO(KINDS[name])).size
    assert name.startswith((found.format, "progressive"))


@pytest.mark.parametrize("size", [(1, 1), (1, 16_383), (16_383, 3), (300, 200)])
@pytest.mark.parametrize("kind", [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_sizes_of_any_shape(size: tuple[int, int], kind: tuple[str, dict[str, bool]]) -> None:
    found = head(encoded(Image.new("RGB", size), kind[0], **kind[1]))
    assert found is not None and found[1:] == size


def test_the_first_bytes_of_a_png_suffice() -> None:
    assert head(KINDS["png"][:STORED_HEAD_BYTES]) == ("png", 48, 32)
    assert head(lying_png(40_000, 30_000)) == ("png", 40_000, 30_000)


@pytest.mark.parametrize("data", [b"", b"GIF89a" + b"\0" * 40, b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"x" * 100])
def test_anything_else_is_nothing(data: bytes) -> None:
    assert head(data) is None


@given(kind=st.sampled_from(sorted(KINDS)), cut=st.integers(0, 200), junk=st.binary(max_size=40))
def test_no_bytes_make_it_stumble(kind: str, cut: int, junk: bytes) -> None:
    head(KINDS[kind][:cut] + junk)


@pytest.mark.parametrize("filling", [b"\xff\xff", b"\xff\x01", b"\xff\xfe\0\2"], ids=["padding", "markers", "segments"])
@pytest.mark.parametrize("before", [b"\xff\xc0", b"\xff\xda"], ids=["the frame", "the scan"])
def test_a_jpeg_of_fillings_costs_no_time(filling: bytes, before: bytes) -> None:
    at = KINDS["jpeg"].index(before)
    data = KINDS["jpeg"][:at] + filling * ((20 << 20) // len(filling)) + KINDS["jpeg"][at:]
    began = time.process_time()
    assert head(data) is None
    with pytest.raises(pictures.Unusable):
        pictures.canonical(data, 1 << 24)
    assert time.process_time() - began < 0.5, "reading each byte of them takes seconds"


def test_a_little_padding_is_read_over() -> None:
    assert head(KINDS["jpeg"].replace(b"\xff\xc0", b"\xff" * 100 + b"\xff\xc0", 1)) == ("jpeg", 48, 32)
