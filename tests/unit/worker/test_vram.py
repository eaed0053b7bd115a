"""How much memory there is for pictures, how large a picture fits into it, and what Z-Image itself would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3Model

from common.models import BUILT_IN, ModelSpec
from worker.pipelines.base import MIB, ImageRequest, Tuning
from worker.pipelines.zimage import Pipeline
from worker.vram import CUDA_CONTEXT, budget_bytes, largest_picture
from worker.zimage import offload
from worker.zimage.memory import peak_bytes
from worker.zimage.shape import Shape, shape_of

SPECS = {spec.name: spec for spec in BUILT_IN}
PICO, TURBO = SPECS["pico"], SPECS["turbo"]
GIB = 1024 * MIB
TOKENS = 24  # of a prompt of some twenty words


class Meter:
    """In place of a pipeline: a picture takes so many bytes a pixel."""

    def __init__(self, each: int) -> None:
        self.each = each

    def peak_bytes(self, requests: Sequence[ImageRequest]) -> int:
        return sum(request.width * request.height for request in requests) * self.each


@pytest.fixture(scope="module")
def pico() -> Pipeline:
    made = Pipeline(PICO, device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def full() -> tuple[Shape, int]:
    """The shape of Z-Image's own checkpoints, and the bytes of their weights in bfloat16."""
    with init_empty_weights():
        transformer: Any = ZImageTransformer2DModel()  # whose defaults are Z-Image's
        text_encoder: Any = Qwen3Model(
            Qwen3Config(
                vocab_size=151_936,
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
            )
        )
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    parts = [part.to(torch.bfloat16) for part in (transformer, text_encoder, vae)]
    weights = sum(weight.nbytes for part in parts for weight in part.parameters())
    return shape_of(SimpleNamespace(transformer=transformer, text_encoder=text_encoder, vae=vae)), weights


def estimate(shape: Shape, side: int, count: int, *, device: str = "cuda") -> int:
    asked = ImageRequest(prompt="", width=side, height=side, steps=8, guidance_scale=0.0, seed=1)
    tile_above = Tuning().tile_above
    return peak_bytes(shape, [asked] * count, count=lambda _text: TOKENS, tile_above=tile_above, device=device)


def test_a_cpu_without_a_limit_has_no_budget() -> None:
    assert budget_bytes(device="cpu") is None


def test_a_limit_holds_on_a_cpu() -> None:
    assert budget_bytes(device="cpu", limit=6 * GIB) == 6 * GIB


def test_what_others_have_is_not_for_us() -> None:
    budget = budget_bytes(device="cuda", total=80 * GIB, others=10 * GIB)
    assert budget == 70 * GIB - CUDA_CONTEXT
    assert budget_bytes(device="cuda", total=10 * GIB, others=11 * GIB) == 0


def test_the_tighter_of_the_device_and_the_limit_counts() -> None:
    def left(limit: int) -> int | None:
        return budget_bytes(device="cuda", total=80 * GIB, others=30 * GIB, limit=limit)

    assert left(24 * GIB) == 24 * GIB - CUDA_CONTEXT
    assert left(60 * GIB) == 50 * GIB - CUDA_CONTEXT


@given(each=st.integers(1, 5000), budget=st.integers(0, 1 << 36), bound=st.integers(256 * 256, 2048 * 2048))
@settings(deadline=None)
def test_the_largest_picture_fits_and_the_next_does_not(each: int, budget: int, bound: int) -> None:
    spec = ModelSpec.model_validate(TURBO.model_dump() | {"max_pixels": bound})
    meter: Any = Meter(each)
    pixels = largest_picture(meter, spec, budget)
    if pixels == 0:
        assert spec.min_side**2 * each > budget
    elif pixels < bound:
        assert pixels * each <= budget < (pixels**0.5 + 16) ** 2 * each


def test_without_a_budget_or_with_room_for_all_the_models_limit_holds() -> None:
    meter: Any = Meter(1000)
    assert largest_picture(meter, TURBO, None) == TURBO.max_pixels
    assert largest_picture(meter, TURBO, 5 * GIB) == TURBO.max_pixels


def test_the_largest_picture_is_what_is_asked_for_at_least(pico: Pipeline) -> None:
    guided = ImageRequest(prompt="", width=192, height=192, steps=1, guidance_scale=4.0, seed=0)
    budget = pico.peak_bytes([replace(guided, guidance_scale=0.0)])
    assert budget < pico.peak_bytes([guided])
    assert largest_picture(pico, PICO.model_copy(update={"guidance_scale": 4.0}), budget) >= 192 * 192


def test_picos_largest_picture_grows_with_its_budget(pico: Pipeline) -> None:
    largest = [largest_picture(pico, PICO, budget) for budget in (0, 5 * MIB, 12 * MIB, 20 * MIB, 100 * MIB)]
    assert largest == sorted(set(largest))
    assert largest[0] == 0
    assert largest[-1] == PICO.max_pixels


@pytest.mark.parametrize("name", ["turbo", "base"])
def test_the_memory_that_the_catalogue_asks_for_is_that_of_one_picture(full: tuple[Shape, int], name: str) -> None:
    shape, weights = full
    needed = (weights + CUDA_CONTEXT + estimate(shape, SPECS[name].width, 1)) / MIB
    assert needed <= SPECS[name].memory_mb <= 1.01 * needed


def test_what_waits_elsewhere_leaves_room_for_one_picture(full: tuple[Shape, int]) -> None:
    shape, _ = full
    assert estimate(shape, 1024, 1) <= offload.FORWARD + offload.MARGIN <= 1.05 * estimate(shape, 1024, 1)


def test_z_image_on_the_gpus_it_is_made_for(full: tuple[Shape, int]) -> None:
    shape, weights = full
    for memory, count in ((24, 1), (32, 8), (80, 32)):
        budget = budget_bytes(device="cuda", total=memory * GIB)
        assert budget is not None and weights + estimate(shape, 1024, count) <= budget


def test_the_figures_in_the_measurements(full: tuple[Shape, int]) -> None:
    shape, weights = full
    assert round(weights / MIB) == 19_572
    table = {
        (side, count): round(estimate(shape, side, count) / MIB) for side in (1024, 2048) for count in (1, 2, 4, 8)
    }
    assert table == {
        (1024, 1): 2746,
        (1024, 2): 2752,
        (1024, 4): 2763,
        (1024, 8): 4332,
        (2048, 1): 2810,
        (2048, 2): 4306,
        (2048, 4): 8548,
        (2048, 8): 17032,
    }
