"""A client's picture, made into what is stored of it: an upright PNG, RGB or grey, in sRGB, without metadata.

Of several frames the first counts. Transparent parts become white. A colour profile is applied; a grey picture's, or
one that cannot be read, is dropped.
"""

from __future__ import annotations

import binascii
import io
import re
import string
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from common.schemas import ImageFormat
from gateway import formats

MAX_SCANS = 64  # of a JPEG; a camera's has 10, and each costs as much as the whole picture
MAX_CHUNKS = 32_768  # of a PNG; 100 MiB in pieces of 8 KiB have 12,800, and Pillow takes each in Python

_FORMATS = [
    plugin.format
    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile)
]
_GREY = ("1", "L", "LA")
_RLE = 3  # zlib's Z_RLE: a fifth faster than its default on filtered rows, and smaller
_DATA_URL = re.compile(r"\s*data:[^,]{0,100};base64,", re.IGNORECASE)
_HANDLE = re.compile(r"\s*img_[0-9a-z]{0,40}\s*", re.IGNORECASE)  # or what was meant as one
_BASE64 = (string.ascii_letters + string.digits + "+/=" + string.whitespace).encode()
_URL_SAFE = {ord("-"): "+", ord("_"): "/"}

Image.MAX_IMAGE_PIXELS = None  # the limit here is a setting, and is kept before Pillow sees the file
Image.preinit()  # now, as it would be in a native thread otherwise


class Unusable(Exception):
    """Raised for what is no picture to start from; the message follows the field's name."""


class Picture(NamedTuple):
    """What is stored of a picture, its size in pixels, and what kind of file it came in."""

    png: bytes
    width: int
    height: int
    format: ImageFormat


def from_text(text: str) -> bytes:
    """Return the file that stands in a request as base64 or as a data: URL; raises Unusable."""
    if _HANDLE.fullmatch(text):
        raise Unusable("is no handle as /api/images gives them: img_ and 32 digits of 0-9 a-f, nothing around them")
    begin = match.end() if (match := _DATA_URL.match(text)) else 0
    try:
        encoded = text[begin:].translate(_URL_SAFE).encode("ascii")
        if encoded.translate(None, _BASE64):
            raise ValueError
        return binascii.a2b_base64(encoded + b"==")
    except ValueError:
        raise Unusable("is neither a handle of /api/images nor a picture in base64") from None


def canonical(data: bytes, max_pixels: int) -> Picture:
    """Return the picture in a file; raises Unusable. Nothing is decoded of one that says it has more pixels."""
    upright, kind = _decoded(data, max_pixels, _plain)
    return Picture(_encoded(upright), *upright.size, kind)


def mask_of_holes(data: bytes, max_pixels: int) -> bytes:
    """Return a mask as it is meant here, a grey PNG that is white where to paint, from one that is transparent there.

    Raises Unusable, as for a file without transparent parts. Nothing is decoded of one that says it has more pixels.
    """
    return _encoded(_decoded(data, max_pixels, _holes)[0])


def _decoded(
    data: bytes, max_pixels: int, use: Callable[[Image.Image], Image.Image]
) -> tuple[Image.Image, ImageFormat]:
    """Return what `use` makes of the picture in a file, and the file's kind."""
    head = formats.head(data)
    if head is None:
        raise Unusable("is no PNG, JPEG or WebP picture")
    if head.width * head.height > max_pixels:
        raise Unusable(f"has {head.width}x{head.height} pixels; at most {max_pixels} (ZFLEET_INPUT_MAX_PIXELS)")
    if head.format == "jpeg" and data.count(b"\xff\xda") > MAX_SCANS:
        raise Unusable(f"is a JPEG of more than {MAX_SCANS} scans; save it anew")
    if head.format == "png" and formats.png_chunks(data, MAX_CHUNKS) > MAX_CHUNKS:
        raise Unusable(f"is a PNG of more than {MAX_CHUNKS} chunks; save it anew")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.size != (head.width, head.height):
                raise Unusable("is broken: it has two sizes")
            image.load()
            return use(image), head.format
    except Unusable:
        raise
    except Exception:  # Pillow's plugins raise whatever a broken file makes them stumble over
        raise Unusable(f"is a broken or cut-off {head.format.upper()} file") from None


def _plain(image: Image.Image) -> Image.Image:
    """Return the picture upright, RGB or L, in sRGB, on white."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image.convert("L") if image.mode in _GREY else _in_srgb(image, profile)
    if alpha is not None and alpha.getextrema() != (255, 255):
        ground = Image.new(plain.mode, plain.size, "white")
        ground.paste(plain, mask=alpha)
        plain = ground
    return plain


def _holes(image: Image.Image) -> Image.Image:
    """Return how transparent the picture is, upright: white where wholly."""
    image = ImageOps.exif_transpose(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is None or alpha.getextrema() == (255, 255):
        raise Unusable("must be transparent where the picture is to be painted over; nothing of it is")
    return ImageOps.invert(alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of 16 bits as grey of 8."""
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture as RGB, by its profile where it has one that fits it."""
    colour = image if image.mode in ("RGB", "CMYK") else image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            made = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            made = None
        if made is not None:
            return made
    return colour.convert("RGB")


def _encoded(image: Image.Image) -> bytes:
    image.info = {}  # Pillow would write some of it
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1, compress_type=_RLE)
    return out.getvalue()
