"""Large pictures are encoded in tiles, and what is made of them hardly differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.miniatures import PICO, control_checkpoint
from tests.unit.worker.zimage.driving import Floats, ask, load, masked, painted, picture
from tests.unit.worker.zimage.stock import Stock
from worker.pipelines.base import Tuning
from worker.pipelines.zimage import Pipeline
from worker.zimage.decoding import decode
from worker.zimage.inputs import encode

pytestmark = pytest.mark.usefixtures("one_thread")


def psnr(one: Floats, other: Floats) -> float:
    """In decibels, of values in 0..1."""
    return -10 * math.log10(float(np.square(one - other).mean()))


@contextmanager
def encoded(pipeline: Pipeline) -> Iterator[list[tuple[int, int]]]:
    """Tell the sizes (width, height) of what the encoder reads."""
    read: list[tuple[int, int]] = []
    hook = pipeline._parts.vae.encoder.register_forward_pre_hook(
        lambda _module, args: read.append((args[0].shape[-1], args[0].shape[-2]))
    )
    try:
        yield read
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("width", "height", "side", "floor"),
    # measured, the least of the three pictures: 28.6, 30.2 and 31.3; what pico's VAE itself loses of them leaves 16
    [(256, 256, 128, 27.0), (384, 512, 256, 29.0), (272, 400, 256, 30.0)],
)
def test_latents_of_tiles_look_like_those_of_the_whole(
    pipeline: Pipeline, width: int, height: int, side: int, floor: float
) -> None:
    vae = pipeline._parts.vae
    for look in range(3):
        drawn = painted(look, width=width, height=height)
        with torch.inference_mode(), encoded(pipeline) as read:
            whole, tiled = encode(vae, drawn, "cpu"), encode(vae, drawn, "cpu", tile_above=side**2)
            shown, other = decode(vae, whole).numpy(), decode(vae, tiled).numpy()
        assert read[0] == (width, height)
        assert len(read) > 2
        assert max(wide * high for wide, high in read[1:]) <= side**2
        assert tiled.shape == whole.shape
        assert not torch.equal(tiled, whole)
        assert psnr(shown, other) >= floor


def test_a_picture_that_is_not_larger_is_encoded_whole(pipeline: Pipeline) -> None:
    vae, drawn = pipeline._parts.vae, painted(1, width=128, height=96)
    with torch.inference_mode():
        assert torch.equal(encode(vae, drawn, "cpu"), encode(vae, drawn, "cpu", tile_above=128 * 96))


@pytest.fixture(scope="module")
def tiling(one_thread: None) -> Pipeline:
    made = Pipeline(PICO, device="cpu", tuning=Tuning(tile_above=128 * 128))
    made.load()
    return made


def test_pictures_of_tiles_look_like_the_stock_calls(tiling: Pipeline, stock: Stock) -> None:
    large = {"width": 256, "height": 192}
    start = {"init_image": painted(1, **large), "strength": 0.6, **large}
    painting = ask(**start, mask_image=masked(2, **large))
    for request, floor in ((ask(**start), 45.0), (painting, 29.0)):  # measured: 47.9 and 30.3
        with encoded(tiling) as read:
            made = picture(tiling, request)
        assert len(read) > 1
        assert psnr(made, stock.picture(request)) >= floor
    assert not tiling._parts.vae.use_tiling


def test_a_picture_below_the_threshold_equals_the_stock_call(tiling: Pipeline, stock: Stock) -> None:
    small = {"width": 128, "height": 128}
    request = ask(init_image=painted(1, **small), strength=0.6, **small)
    assert np.abs(picture(tiling, request) - stock.picture(request)).max() <= 1e-4


def test_a_control_picture_is_encoded_in_tiles_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    spec = control_checkpoint(tmp_path_factory.mktemp("control"), "control_noise_refiner", channels=33)
    made = Pipeline(spec, device="cpu", tuning=Tuning(tile_above=128 * 128))
    made.load()
    whole = load(spec)
    large = {"width": 256, "height": 192}
    request = ask(control_image=painted(1, **large), control_scale=0.7, **large)
    with encoded(made) as read:
        tiled = made.start(request)
    assert len(read) > 1
    one, other = tiled.control.latents, whole.start(request).control.latents  # type: ignore[attr-defined]
    assert one.shape == other.shape
    assert float((one - other).square().mean().sqrt() / other.std()) < 0.2
