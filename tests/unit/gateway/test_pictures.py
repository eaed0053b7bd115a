from __future__ import annotations

import base64
import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from gateway import pictures
from gateway.pictures import Picture, Unusable, canonical, from_text
from tests.samples import drawn, encoded, lying_png

LIMIT = 1 << 20
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def opened(made: Picture) -> Image.Image:
    return Image.open(io.BytesIO(made.png))


def near(image: Image.Image, other: Image.Image, within: float) -> bool:
    both = [np.asarray(one.convert("RGB")).astype(int) for one in (image, other)]
    return image.size == other.size and float(np.abs(both[0] - both[1]).mean()) <= within


def chunks(png: bytes) -> list[str]:
    at, found = 8, []
    while at < len(png):
        found.append(png[at + 4 : at + 8].decode())
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return found


@pytest.mark.parametrize(
    ("kind", "mode", "options", "within"),
    [
        ("PNG", "RGB", {}, 0), ("PNG", "L", {}, 0), ("PNG", "1", {}, 0), ("PNG", "P", {}, 0), ("PNG", "RGBA", {}, 0),
        ("PNG", "LA", {}, 0), ("JPEG", "RGB", {"quality": 95}, 2), ("JPEG", "L", {"quality": 95}, 2),
        ("JPEG", "CMYK", {"quality": 95}, 4), ("JPEG", "RGB", {"progressive": True, "quality": 95}, 2),
        ("WEBP", "RGB", {"lossless": True}, 0), ("WEBP", "RGBA", {"lossless": True}, 0), ("WEBP", "RGB", {}, 6),
    ],
)  # fmt: skip
def test_every_kind_keeps_its_picture(kind: str, mode: str, options: dict[str, object], within: float) -> None:
    source = drawn(mode=mode)
    data = encoded(source, kind, **options)
    made = canonical(data, LIMIT)
    assert (made.width, made.height, made.format) == (48, 32, kind.lower())
    assert opened(made).mode == ("L" if mode in ("L", "1", "LA") else "RGB")
    assert near(opened(made), source, within)


def test_sixteen_bits_become_eight() -> None:
    values = (np.arange(48 * 32).reshape(32, 48) * 42).astype(np.uint16)
    made = np.asarray(opened(canonical(encoded(Image.fromarray(values)), LIMIT)))
    assert np.abs(made.astype(int) - values // 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_it_stands_upright_whichever_way_the_camera_was_held(orientation: int, kind: str) -> None:
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_90,
        7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = drawn().transpose(undo[orientation]) if orientation in undo else drawn()
    made = canonical(encoded(stored, kind, exif=exif, quality=95), LIMIT)
    assert (made.width, made.height) == (48, 32)
    assert near(opened(made), drawn(), 5)


def test_metadata_goes() -> None:
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("secret", "where I live")
    exif[0x010F] = "a camera"
    data = encoded(pnginfo=info, exif=exif, dpi=(72, 72), icc_profile=SRGB)
    assert {"tEXt", "eXIf", "pHYs", "iCCP"} <= set(chunks(data))
    assert set(chunks(canonical(data, LIMIT).png)) == {"IHDR", "IDAT", "IEND"}
    palette = drawn(mode="P")
    palette.info["transparency"] = 3
    assert set(chunks(canonical(encoded(palette), LIMIT).png)) == {"IHDR", "IDAT", "IEND"}


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(kind: str, options: dict[str, bool], mode: str) -> None:
    source = Image.new(mode, (16, 16), (0,) * len(mode))
    source.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 8, 16))
    source.paste((0,) * (len(mode) - 1) + (128,), (8, 0, 12, 16))
    pixels = np.asarray(opened(canonical(encoded(source, kind, **options), LIMIT)).convert("L"))
    assert (pixels[:, :8].max(), pixels[:, 12:].min()) == (0, 255)
    assert np.abs(pixels[:, 8:12].astype(int) - 127).max() <= 1


def test_one_colour_of_a_palette_may_be_transparent() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 0, 0])
    assert np.asarray(opened(canonical(encoded(image, transparency=1), LIMIT))).min() == 255


def test_a_colour_profile_is_applied() -> None:
    """A profile whose red and blue are swapped swaps them back."""
    made = canonical(encoded(icc_profile=SRGB), LIMIT)
    assert near(opened(made), drawn(), 1)
    swapped = bytearray(SRGB)
    for one, other in ((b"rXYZ", b"bXYZ"),):
        begin, end = swapped.index(one), swapped.index(other)
        swapped[begin : begin + 4], swapped[end : end + 4] = other, one
    changed = opened(canonical(encoded(icc_profile=bytes(swapped)), LIMIT))
    assert not near(changed, drawn(), 20)
    assert near(changed, Image.merge("RGB", drawn().split()[::-1]), 6)


@pytest.mark.parametrize("profile", [b"x", SRGB[:300], SRGB[:100] + b"\xff" * 400])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_profile_that_is_broken_or_of_another_kind_is_dropped(profile: bytes, mode: str) -> None:
    assert near(opened(canonical(encoded(drawn(mode=mode), "JPEG", icc_profile=profile), LIMIT)), drawn(mode=mode), 4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    data = encoded(kind=kind, save_all=True, append_images=[Image.new("RGB", (48, 32))], duration=100, lossless=True)
    assert near(opened(canonical(data, LIMIT)), drawn(), 0)


@pytest.mark.parametrize("data", [b"", b"hello", encoded(kind="GIF"), encoded(kind="BMP"), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_such_picture_is_refused(data: bytes) -> None:
    with pytest.raises(Unusable, match="is no PNG, JPEG or WebP picture"):
        canonical(data, LIMIT)


def test_a_picture_with_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_args: object, **_named: object) -> None:
        pytest.fail("it was decoded")

    monkeypatch.setattr(pictures.Image, "open", decode)
    for data, size in (
        (lying_png(40_000, 40_000), "40000x40000"),
        (lying_png(2**31 - 1, 2**31 - 1), "2147483647x2147483647"),
        (encoded(Image.new("RGB", (1025, 1024)), "JPEG"), "1025x1024"),
        (encoded(Image.new("RGB", (1025, 1024)), "WEBP"), "1025x1024"),
    ):
        with pytest.raises(Unusable, match=rf"has {size} pixels; at most 1048576 \(ZFLEET_INPUT_MAX_PIXELS\)"):
            canonical(data, LIMIT)


def test_the_limit_itself_is_allowed() -> None:
    assert canonical(encoded(Image.new("RGB", (1024, 1024)), "WEBP"), LIMIT).width == 1024


@pytest.mark.parametrize("size", [(480, 320), (0, 32), (0, 0), (49, 32)])
def test_a_head_that_lies_is_found_out(size: tuple[int, int]) -> None:
    with pytest.raises(Unusable, match="broken or cut-off PNG"):
        canonical(lying_png(*size), LIMIT)


def test_a_jpeg_with_two_sizes_or_very_many_scans_is_refused() -> None:
    data = encoded(kind="JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    other = bytearray(data[frame : frame + length])
    other[5:9] = b"\x20\x00\x20\x00"
    with pytest.raises(Unusable, match=r"two sizes|broken"):
        canonical(data[: frame + length] + bytes(other) + data[frame + length :], LIMIT)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(Unusable, match="more than 64 scans"):
        canonical(data[:-2] + data[scan:-2] * 80 + data[-2:], LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_off_file_is_refused(kind: str) -> None:
    data = encoded(drawn(256, 256), kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(Unusable, match=rf"broken or cut-off {kind}"):
            canonical(data[: int(len(data) * share)], LIMIT)


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from([encoded(kind=kind) for kind in ("PNG", "JPEG", "WEBP")]),
    at=st.integers(0, 2000),
    junk=st.binary(min_size=1, max_size=8),
)
def test_whatever_is_in_a_file_it_is_a_picture_or_refused(data: bytes, at: int, junk: bytes) -> None:
    with contextlib.suppress(Unusable):
        made = canonical(data[:at] + junk + data[at + len(junk) :], LIMIT)
        assert opened(made).size == (made.width, made.height)


@pytest.mark.parametrize("data", [encoded(kind="PNG"), b"\xfb\xff\xbe\x00", b"a", b"ab"])
def test_base64_in_all_its_spellings(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    for text in (plain, plain.rstrip("="), base64.urlsafe_b64encode(data).decode(), wrapped):
        assert from_text(text) == data
        assert from_text("data:image/png;base64," + text) == data
        assert from_text("data:;base64," + text) == data


@pytest.mark.parametrize("text", ["ä", "img_123ä", "x"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(Unusable, match="neither a handle"):
        from_text(text)


def test_a_png_of_empty_chunks_costs_no_time() -> None:
    data, chunk = encoded(), struct.pack(">I4sI", 0, b"tESt", zlib.crc32(b"tESt"))
    assert canonical(data[:33] + chunk * 1000 + data[33:], 1 << 24).width == 48
    began = time.process_time()
    with pytest.raises(Unusable, match="more than 32768 chunks"):
        canonical(data[:33] + chunk * 1_700_000 + data[33:], 1 << 24)
    assert time.process_time() - began < 0.6, "reading them all takes seconds"


def test_what_was_meant_as_a_handle_is_told_so() -> None:
    for text in ("IMG_" + "a" * 32, "img_" + "a" * 32 + "\n", "img_x"):
        with pytest.raises(Unusable, match="is no handle"):
            from_text(text)


def test_letters_that_base64_has_not_are_not_left_out_in_silence() -> None:
    encoded = base64.b64encode(b"a picture").decode()
    for text in (encoded[:4] + "*" + encoded[4:], encoded + "é"):
        with pytest.raises(Unusable, match="base64"):
            from_text(text)
    assert from_text(" DATA:image/png;BASE64,\n" + encoded) == b"a picture"


def test_a_mask_is_white_where_a_file_is_transparent() -> None:
    image = Image.new("RGBA", (40, 20), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 10, 20))
    image.paste((200, 0, 0, 55), (10, 0, 20, 20))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        mask = Image.open(io.BytesIO(pictures.mask_of_holes(encoded(image, kind, **options), LIMIT)))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (40, 20))
        assert [mask.getpixel((x, 5)) for x in (5, 15, 30)] == [255, 200, 0]


def test_a_mask_without_holes_or_too_large_is_refused() -> None:
    for image in (drawn(), Image.new("RGBA", (8, 8), "red"), Image.new("L", (8, 8))):
        with pytest.raises(Unusable, match="must be transparent where"):
            pictures.mask_of_holes(encoded(image), LIMIT)
    with pytest.raises(Unusable, match="60000x60000"):
        pictures.mask_of_holes(lying_png(60_000, 60_000), LIMIT)
    with pytest.raises(Unusable, match="no PNG"):
        pictures.mask_of_holes(b"x", LIMIT)
