"""How many bytes a call of Z-Image's models takes at its fullest moment, beside weights and what its caller holds.

Each formula names the moment of the call at which most is alive, and counts the tensors that are alive then: those that
the call's own frames still name, and those that the operator in hand reads and writes. They were read off diffusers
0.42.1 (models/transformers/transformer_z_image.py, models/controlnets/controlnet_z_image.py,
models/autoencoders/vae.py, models/resnet.py) and transformers' Qwen3, and are held against counted allocations by
tests/unit/worker/test_zimage_memory.py.

No matrix of length x length is counted: with a mask or without, head widths of Z-Image are served by kernels that keep
none (flash and memory-efficient attention on CUDA; flash on a CPU). A mask costs a byte a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.zimage.shape import PATCH, TOKEN_MULTIPLE, Autoencoder, ControlNet, TextEncoder, Transformer

FLOAT32 = 4  # bytes
COLOURS = 3
POSITION = 3 * 4 + 2  # bytes a token: its place on three axes in int32, whether it is padding, whether attended
MODULATION = 9  # vectors an item: adaLN's four, four more of 1 + scale and tanh(gate), and the time's
BLOCKED = 16  # a convolution's inner copies have their channels padded to a multiple of this
KERNEL = 3 * 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One sequence of a forward: a run brings one, or two with guidance. All counts are of tokens, not yet padded."""

    picture: int
    caption: tuple[int, ...]  # one piece; more where pictures stand between
    references: tuple[int, ...] = ()  # of pictures to read
    features: tuple[int, ...] = ()  # of what SigLIP sees in them
    control: bool = False

    @property
    def pictures(self) -> int:
        """Tokens of all pictures, padded."""
        return sum(map(padded, (self.picture, *self.references)))

    @property
    def seen(self) -> int:
        """Tokens of all features, padded; the picture asked for has padding in place of some."""
        return sum(map(padded, self.features)) + TOKEN_MULTIPLE if self.features else 0

    @property
    def captions(self) -> int:
        """Tokens of the caption, padded."""
        return sum(map(padded, self.caption))

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.pictures + self.captions + self.seen


def tokens_of(width: int, height: int, factor: int) -> int:
    """Return the tokens of a picture of this size in pixels, under an autoencoder of this factor."""
    side = factor * PATCH
    return (width // side) * (height // side)


def padded(tokens: int) -> int:
    """Return how many tokens the transformer makes of a piece."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def denoise_bytes(shape: Transformer, items: Sequence[Item]) -> int:
    """Return the peak of one forward: in the feed-forward of a main block, as it multiplies silu(w1 h) by w3 h.

    Alive for each token then: four inner vectors (w1 h, w3 h, silu, the product), and of the model's width the block's
    input (its caller's), the attention's output, the input plus that, and h, normed and scaled. The forward itself
    holds the refined pictures and captions as well, and the rotary tables, of both and of the joined sequence. Items
    count as long as the longest of the batch. The attention stays below: input, h, q, k, v and ten bytes an element
    for the float32 copies of RMSNorm or of the rotation are less than four times 8/3 inner vectors, in any dtype.

    A checkpoint that reads pictures modulates each token by itself: four more vectors (`select_per_token`).
    """
    if not items:
        return 0
    controlled = [item for item in items if item.control]
    if shape.controlnet is None or not controlled:
        return _inputs(shape, items) + _block(shape, items)
    made = shape.controlnet.layers * _joined(controlled) * shape.dim * shape.dtype_bytes
    inside = _control(shape, shape.controlnet, controlled)
    return max(inside, made + _inputs(shape, items) + _block(shape, items))


def _control(shape: Transformer, net: ControlNet, items: Sequence[Item]) -> int:
    """Return the peak of the ControlNet's own forward, for the items that have a control.

    Its blocks hand on all that those before have made in one tensor, which each stacks anew: with n blocks, n in the
    old stack, n + 1 in the new one and two not yet stacked; or n in the last block's feed-forward. The stack over the
    noise refiner's input, and its samples, stay alive.
    """
    width = shape.dim * shape.dtype_bytes
    kept = _pictures(items) * width * (1 + (net.refiners + 1 + net.refined if net.refiners else 0))
    joined = _joined(items) * width
    stacking = joined * (2 * net.layers + 4)
    return _inputs(shape, items) + kept + max(stacking, net.layers * joined + _block(shape, items))


def _pictures(items: Sequence[Item]) -> int:
    return len(items) * max(item.pictures for item in items)


def _joined(items: Sequence[Item]) -> int:
    return len(items) * max(item.length for item in items)


def _inputs(shape: Transformer, items: Sequence[Item]) -> int:
    """Return the bytes of what a forward holds beside its blocks: refined parts, rotary tables and positions.

    A caption's table is made for its padding twice and then cut, so that all of it stays.
    """
    captions = len(items) * max(item.captions for item in items)
    spare = len(items) * max(item.captions - sum(item.caption) for item in items)
    seen = len(items) * max(item.seen for item in items)
    parts = _pictures(items) + captions + seen
    width = shape.dim * shape.dtype_bytes
    rotary = shape.head_dim * FLOAT32  # half as many complex64
    tables = (parts + spare + _joined(items)) * rotary
    return parts * (width + POSITION) + tables + len(items) * MODULATION * width


def _block(shape: Transformer, items: Sequence[Item]) -> int:
    """Return the bytes alive in a block's feed-forward, the block's input among them."""
    vectors = 8 if shape.features_dim else 4
    return _joined(items) * (vectors * shape.dim + 4 * shape.feed_forward) * shape.dtype_bytes


def decode_bytes(shape: Autoencoder, width: int, height: int, *, tile: int | None = None) -> int:
    """Return the peak of decoding one picture of this size in pixels, or of decoding it in tiles of so many pixels.

    The decoder is walked in the order in which it runs: a middle at the latents' size, then for each size a block of
    `layers` + 1 resnets and an enlargement. With Flux's channels the fullest moment is the last enlargement, where 256
    channels at the picture's own size are made of as many.
    """
    area = width * height
    if tile is not None and area > tile:
        return _in_tiles(shape, area, decode_bytes(shape, tile, 1))
    area = -(-area // shape.factor**2)
    channels = shape.blocks[-1]
    peak = max(_conv(shape.channels, channels, area), _middle(channels, area))
    for level, out in enumerate(reversed(shape.blocks)):
        entered = channels * area  # the decoder holds a block's input until the block is done
        peak = max(peak, _resnet(channels, out, area), entered + _resnet(out, out, area))
        channels = out
        if level < len(shape.blocks) - 1:
            peak = max(peak, entered + channels * area + _conv(channels, channels, 4 * area))
            area *= 4
    peak = max(peak, 3 * channels * area, _conv(channels, COLOURS, area))
    return max(peak * shape.dtype_bytes, 3 * COLOURS * FLOAT32 * area)


def _in_tiles(shape: Autoencoder, area: int, one: int) -> int:
    """Return the peak of decoding so many pixels in tiles, of which the largest allowed takes `one` bytes.

    `tiling.tile_side` may choose tiles of half that side, and then a third of this is taken. It is counted all the
    same, so that a larger picture is never estimated to take less than one that is just not tiled.

    All tiles are kept, and their overlaps of a quarter a side make them 16/9 of the picture: beside the last tile, or
    beside the rows and the picture that they are joined to. In the end the picture is widened to float32 and scaled.
    """
    picture = area * COLOURS * shape.dtype_bytes
    tiles = picture * 16 // 9
    return max(tiles + one, tiles + 2 * picture, picture + 3 * area * COLOURS * FLOAT32)


def encode_bytes(shape: Autoencoder, width: int, height: int, *, tile: int | None = None) -> int:
    """Return the peak of encoding one picture of this size in pixels: the decoder's walk the other way round.

    With Flux's channels the fullest moment is a convolution of the second resnet, at the picture's own size. In tiles
    of so many pixels it is that of the largest allowed, beside the picture and what was made of other tiles (as with
    `_in_tiles`), or all of that as it is joined; or still the making of the picture out of its bytes.
    """
    area = width * height
    if tile is not None and area > tile:
        made = 2 * shape.channels * area // shape.factor**2 * shape.dtype_bytes
        inside = made * 16 // 9 + max(encode_bytes(shape, tile, 1), 2 * made)
        return max(COLOURS * area * shape.dtype_bytes + inside, 3 * COLOURS * FLOAT32 * area)
    channels = shape.blocks[0]
    peak = _conv(COLOURS, channels, area)
    for level, out in enumerate(shape.blocks):
        entered = channels * area
        peak = max(peak, _resnet(channels, out, area))
        if shape.layers > 1:
            peak = max(peak, entered + _resnet(out, out, area))
        channels = out
        if level < len(shape.blocks) - 1:
            smaller = area // 4  # made by a convolution with a stride, of a copy that was padded
            peak = max(peak, entered + channels * area + _conv(channels, channels, area, smaller))
            area = smaller
    peak = max(peak, _middle(channels, area), _conv(channels, 2 * shape.channels, area))
    return max(peak * shape.dtype_bytes, 3 * COLOURS * FLOAT32 * width * height)


def _conv(into: int, out: int, area: int, out_area: int | None = None) -> int:
    """Values alive in a convolution: what it reads and writes, and both once more in the order it works in.

    Kernels for tensor cores want the channels last, and cuDNN brings tensors into that order and back in its
    workspace, weights as well; oneDNN does so in blocks of 16 channels. On a CPU it is the wider of the two alone that
    is copied, so that there this counts up to a third too much.
    """
    copies = [-(-channels // BLOCKED) * BLOCKED for channels in (into, out)]
    read, written = into + copies[0], out + copies[1]
    return read * area + written * (area if out_area is None else out_area) + into * out * KERNEL


def _resnet(into: int, out: int, area: int) -> int:
    """Values alive in ResnetBlock2D, its input among them.

    In turn: the first norm and its SiLU; the first convolution; the second; the two branches, their sum, and that
    divided by the output's scale.
    """
    shortcut = out if into != out else 0
    convolutions = max(_conv(into, out, area), _conv(out, out, area)) + into * area
    return max(convolutions, 3 * into * area, (into + shortcut + 3 * out) * area)


def _middle(channels: int, area: int) -> int:
    """Values alive in UNetMidBlock2D: in a resnet beside the block's input, or in its one head of attention.

    Attention: the block's input, the residual, that normed and laid out by rows, queries, keys, values, the output as
    it comes and by rows, and its projection.
    """
    return max(channels * area + _resnet(channels, channels, area), 9 * channels * area)


def text_bytes(shape: TextEncoder, tokens: int) -> int:
    """Return the peak of encoding a text: in the last layer, while what each layer has made is still kept.

    There it is the feed-forward (its input, the gate's SiLU, the other half and their product) or the attention (its
    input, and queries, keys and values with the products of the rotation: eight times the queries).
    """
    kept = (shape.layers + 1) * shape.dim + 2 * shape.head_dim  # the rotation's cosines and sines
    inside = shape.dim + max(3 * shape.feed_forward, 8 * shape.heads * shape.head_dim)
    return tokens * (kept + inside) * shape.dtype_bytes
