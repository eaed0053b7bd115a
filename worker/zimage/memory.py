"""What pictures take of a device's memory while Z-Image makes them together, beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from worker.pipelines.base import MIB, ImageRequest
from worker.zimage.calls import FLOAT32, Item, decode_bytes, denoise_bytes, encode_bytes, text_bytes, tokens_of
from worker.zimage.omni import MOST_PIXELS
from worker.zimage.shape import Autoencoder, Shape, Transformer

SAFETY = (
    1.1  # what an allocator loses to rounding and to gaps; on a CPU, where nothing is lost, the formulas alone hold
)
CUDA_WORKSPACE = 64 * MIB  # cuBLAS and cuBLASLt keep 32 MiB each on Hopper, 8 and 1 before
CHAT = 8  # tokens that the chat template puts around a prompt
MARK = 16  # tokens at most of what stands before or after a picture, in a tokenizer that does not know the mark
LATENTS = 5  # held by a run: now, before the last step, and of a picture that is painted into, its noise, its mask

Count = Callable[[str], int]  # the tokens of a text


def peak_bytes(
    shape: Shape, requests: Sequence[ImageRequest], *, count: Count, tile_above: int, device: str, loras: int = 0
) -> int:
    """Return an estimate, from above, of what these pictures take while they are made together.

    It is what all of them hold, and the largest call: one forward for all that share a step, or the decoding, the
    encoding or the text of any one, with the weights that come for it where they wait elsewhere. `count` gives the
    tokens of a text; a picture above `tile_above` pixels is decoded and encoded in tiles no larger. `loras` is what
    their LoRAs still have to bring to the device. SigLIP's own call is left out: a forward over what it makes is many
    times wider. So are a waiting autoencoder's weights, which come by a few MiB at a time.
    """
    if not requests:
        return 0
    transformer, autoencoder, encoder = shape.transformer, shape.autoencoder, shape.text_encoder
    held, moving = loras, 0
    calls: list[int] = []
    forwards: dict[Hashable, list[Item]] = {}
    for request in requests:
        items = list(items_of(shape, request, count))
        forwards.setdefault(_sharing(request), []).extend(items)
        held += _held(shape, request, items)
        moving += 2 * len(items) * _latents(autoencoder, request)
        calls.append(decode_bytes(autoencoder, request.width, request.height, tile=tile_above))
        calls += [encode_bytes(autoencoder, width, height, tile=tile_above) for width, height in _given(request)]
        calls += [text_bytes(encoder, max(item.caption)) + encoder.streamed for item in items]
    calls += [denoise_bytes(transformer, items) + transformer.streamed + moving for items in forwards.values()]
    return int((held + max(calls)) * SAFETY) + (CUDA_WORKSPACE if device == "cuda" else 0)


def _sharing(request: ImageRequest) -> Hashable:
    """Return what differs between pictures that may not share a step."""
    return bool(request.reference_images), frozenset(dict(request.loras).items())


def items_of(shape: Shape, request: ImageRequest, count: Count) -> Iterator[Item]:
    """Yield what a picture brings to a forward: one sequence or, with guidance, two."""
    transformer, factor = shape.transformer, shape.autoencoder.factor
    references = tuple(tokens_of(width, height, factor) for width, height in _references(request))
    for text in (request.prompt, request.negative_prompt or "")[: 1 + (request.guidance_scale > 0)]:
        tokens = CHAT + count(text)
        yield Item(
            picture=tokens_of(request.width, request.height, factor),
            caption=(2 * MARK + tokens, *[MARK] * (len(references) + 1)) if references else (tokens,),
            references=references,
            features=(transformer.features_tokens,) * len(references),
            control=request.control_image is not None,
        )


def _held(shape: Shape, request: ImageRequest, items: Sequence[Item]) -> int:
    """Return the bytes that a run holds between steps: latents, captions, and what it reads of other pictures."""
    transformer, autoencoder = shape.transformer, shape.autoencoder
    latents = _latents(autoencoder, request)
    held = LATENTS * latents
    for item in items:
        held += sum(item.caption) * transformer.caption_dim * transformer.dtype_bytes
    if transformer.controlnet is not None and request.control_image is not None:
        held += latents * transformer.controlnet.channels // transformer.channels
    return held + sum(_reference_bytes(transformer, autoencoder, size) for size in _references(request))


def _latents(shape: Autoencoder, request: ImageRequest) -> int:
    """Bytes of a picture's latents in float32."""
    return shape.channels * (request.width // shape.factor) * (request.height // shape.factor) * FLOAT32


def _reference_bytes(transformer: Transformer, autoencoder: Autoencoder, size: tuple[int, int]) -> int:
    features = transformer.features_tokens * transformer.features_dim * FLOAT32
    return autoencoder.channels * size[0] * size[1] // autoencoder.factor**2 * FLOAT32 + features


def _references(request: ImageRequest) -> Iterator[tuple[int, int]]:
    """Yield the sizes (width, height) at which reference pictures are read."""
    for picture in request.reference_images:
        height, width = picture.shape[:2]
        yield (width, height) if width * height <= MOST_PIXELS else (request.width, request.height)


def _given(request: ImageRequest) -> Iterator[tuple[int, int]]:
    """Yield the sizes (width, height) of the pictures that are encoded."""
    if request.init_image is not None or request.control_image is not None:
        yield request.width, request.height
    yield from _references(request)
