"""Large pictures are decoded in tiles, and look as if they were not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.worker.zimage.checkpoints import PICO
from worker.pipelines.base import ImageRequest, Tuning
from worker.pipelines.zimage import Pipeline
from worker.zimage.decoding import decode
from worker.zimage.tiling import tile_side, tiles

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "a red circle left of a green square on a grey background",
    "左边红色圆形，右边绿色正方形，灰色背景",
    "a blue triangle on a white background",
)


@pytest.fixture(scope="module")
def pipeline(one_thread: None) -> Pipeline:
    made = Pipeline(PICO, device="cpu")
    made.load()
    return made


def latents(pipeline: Pipeline, prompt: str, width: int, height: int, seed: int) -> Tensor:
    run: Any = pipeline.start(
        ImageRequest(prompt=prompt, width=width, height=height, steps=4, guidance_scale=0.0, seed=seed)
    )
    while not run.done:
        pipeline.step([run])
    result: Tensor = run.latents
    return result


def psnr(one: Tensor, other: Tensor) -> float:
    """In decibels, of values in 0..1."""
    return -10 * math.log10(float((one - other).square().mean()))


@pytest.mark.parametrize(
    ("width", "height", "side", "floor"),
    [  # measured, the least of the three prompts: 42.1, 33.2, 37.2 and 47.9
        (256, 256, 128, 40.0),
        (512, 512, 128, 32.0),
        (384, 512, 256, 35.0),
        (272, 400, 256, 45.0),
    ],
)
def test_tiles_look_like_the_whole(pipeline: Pipeline, width: int, height: int, side: int, floor: float) -> None:
    for seed, prompt in enumerate(PROMPTS):
        drawn = latents(pipeline, prompt, width, height, seed)
        with torch.inference_mode():
            whole = decode(pipeline._parts.vae, drawn)
            tiled = decode(pipeline._parts.vae, drawn, tile_above=side * side)
        assert tiled.shape == whole.shape
        assert not torch.equal(tiled, whole)
        assert psnr(tiled, whole) >= floor


def test_a_picture_that_is_not_larger_is_decoded_whole(pipeline: Pipeline) -> None:
    drawn = latents(pipeline, PROMPTS[0], 128, 96, 1)
    with torch.inference_mode():
        assert torch.equal(decode(pipeline._parts.vae, drawn), decode(pipeline._parts.vae, drawn, tile_above=128 * 96))


def decoder_sizes(pipeline: Pipeline, tile_above: int, width: int, height: int) -> Sequence[tuple[int, int]]:
    """The sizes in pixels of what the decoder makes for one picture."""
    made: list[tuple[int, int]] = []
    hook = pipeline._parts.vae.decoder.register_forward_hook(
        lambda _module, _args, output: made.append((output.shape[-1], output.shape[-2]))
    )
    try:
        with torch.inference_mode():
            decode(pipeline._parts.vae, torch.zeros(16, 1, height // 8, width // 8), tile_above=tile_above)
    finally:
        hook.remove()
    return made


def test_no_tile_is_larger_than_what_is_decoded_whole(pipeline: Pipeline) -> None:
    assert decoder_sizes(pipeline, 256 * 256, 256, 256) == [(256, 256)]
    made = decoder_sizes(pipeline, 128 * 128, 256, 208)
    assert len(made) > 1
    assert max(width * height for width, height in made) <= 128 * 128


def test_the_setting_reaches_the_decoder() -> None:
    fresh = Pipeline(PICO, device="cpu", tuning=Tuning(tile_above=64 * 64))
    fresh.load()
    made: list[int] = []
    fresh._parts.vae.decoder.register_forward_hook(lambda *_: made.append(1))
    run = fresh.start(ImageRequest(prompt="x", width=128, height=128, steps=1, guidance_scale=0.0, seed=1))
    fresh.step([run])
    picture = fresh.finish(run)
    assert (picture.shape, picture.dtype) == ((128, 128, 3), np.uint8)
    assert len(made) > 1


def test_the_vae_is_left_as_it_was(pipeline: Pipeline) -> None:
    vae = pipeline._parts.vae
    with pytest.raises(ZeroDivisionError), tiles(vae, 512, 512, 128 * 128):
        assert 1 / (not vae.use_tiling)
    assert not vae.use_tiling


@pytest.mark.parametrize("largest", [8, 16, 32, 64, 128, 131])
def test_tiles_leave_no_narrow_strip(largest: int) -> None:
    for rows in range(8, 321, 2):
        for columns in (rows, 128, 320):
            side = tile_side(rows, columns, largest)
            assert 8 <= side <= max(largest, 8)
            assert side % 4 == 0
            assert side >= largest // 2 - 4
    # 1040 x 1040 in tiles of at most 1024: the second of 1024 would be a strip of 272
    assert tile_side(130, 130, 128) < 128
