"""Text, picture and mask: what is made of them equals the stock calls, alone and in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings

from common.errors import PipelineFailed
from tests.unit.worker.zimage.drawing import mixes, steady
from tests.unit.worker.zimage.driving import (
    NOTICED,
    TOLERANCE,
    Visit,
    ask,
    change,
    counted,
    difference,
    masked,
    painted,
    picture,
    pictures,
    together,
)
from tests.unit.worker.zimage.stock import Stock, arguments
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline, ZImageRun
from worker.zimage.inputs import steps_left_out

BLACK, WHITE = (np.full((64, 96), value, dtype=np.uint8) for value in (0, 255))


@pytest.mark.timeout(300)
@settings(steady, max_examples=40)
@given(visits=mixes("text", "image", "inpaint"))
def test_in_any_company_a_picture_equals_the_stock_call(pipeline: Pipeline, stock: Stock, visits: list[Visit]) -> None:
    for visit, run in zip(visits, together(pipeline, visits), strict=True):
        if run.captions:
            assert difference(pipeline.decode(run).numpy(), stock.picture(visit.request)) <= TOLERANCE, visit


@pytest.mark.parametrize("strength", [0.05, 0.5, 0.75, 0.8, 1.0])
@pytest.mark.parametrize("mask", [None, masked(3)], ids=["image", "inpaint"])
def test_a_picture_made_alone_equals_the_stock_call(
    pipeline: Pipeline, stock: Stock, strength: float, mask: Any
) -> None:
    request = ask(steps=5, init_image=painted(1), strength=strength, mask_image=mask)
    assert difference(picture(pipeline, request), stock.picture(request)) <= TOLERANCE


def test_a_schedule_that_shifts_by_size_equals_the_stock_calls(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifting, stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=1.4), Stock()
    stock.schedule_by(shifting)
    monkeypatch.setattr(pipeline._parts, "scheduler", shifting)
    begun = {"init_image": painted(1), "strength": 0.6}
    requests = [ask(steps=4), ask(steps=3, **begun), ask(steps=5, **begun, mask_image=masked(1))]
    for request, made in zip(requests, pictures(pipeline, *requests), strict=True):
        assert difference(made, stock.picture(request)) <= TOLERANCE


def test_runs_with_successive_seeds_are_the_pictures_of_one_stock_call(pipeline: Pipeline, stock: Stock) -> None:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8, 9)]
    called = arguments(ask()) | {"generator": generators, "num_images_per_prompt": 3, "output_type": "np"}
    for mine, theirs in zip(
        pictures(pipeline, *(ask(seed=seed) for seed in (7, 8, 9))), stock.text(**called).images, strict=True
    ):
        assert difference(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize(("steps", "strength", "left_out"), [(8, 1.0, 0), (8, 0.5, 4), (8, 0.6, 3), (8, 0.01, 7)])
def test_a_run_begins_at_the_first_step_that_is_not_left_out(
    pipeline: Pipeline, steps: int, strength: float, left_out: int
) -> None:
    request = ask(steps=steps, strength=strength, init_image=painted(1))
    assert pipeline.start(request).step == left_out
    with counted(pipeline._parts.transformer) as items:
        assert together(pipeline, [Visit(request)])[0].step == steps
    assert items == [1] * (steps - left_out)


def test_a_strength_without_a_picture_leaves_nothing_out(pipeline: Pipeline) -> None:
    assert pipeline.start(ask(strength=0.5)).step == 0


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(PipelineFailed, match=r"use at least 0\.12"):
        steps_left_out(8, 1e-17)


def test_the_lower_the_strength_the_nearer_the_picture(pipeline: Pipeline) -> None:
    start = painted(1).astype(np.float32) / 255
    faint, half, full = pictures(
        pipeline, *(ask(steps=8, init_image=painted(1), strength=strength) for strength in (0.13, 0.26, 1.0))
    )
    assert change(faint, start) + NOTICED < change(half, start)
    assert change(half, start) < change(full, start)


def test_another_picture_to_start_from_is_another_picture(pipeline: Pipeline) -> None:
    one, other = pictures(pipeline, *(ask(init_image=painted(look), strength=0.3) for look in (1, 2)))
    assert change(one, other) > NOTICED


def begun(pipeline: Pipeline, request: ImageRequest) -> ZImageRun:
    return together(pipeline, [Visit(request)])[0]


def test_what_is_masked_black_stays_and_what_is_white_is_painted(pipeline: Pipeline) -> None:
    half = BLACK.copy()
    half[:, 48:] = 255
    request = ask(init_image=painted(1), strength=0.8, mask_image=half)
    run = begun(pipeline, request)
    assert run.kept is not None
    assert torch.equal(run.latents[..., :6], run.kept.latents[..., :6])
    assert not torch.isclose(run.latents[..., 6:], run.kept.latents[..., 6:]).all(dim=0).any()


def test_a_white_mask_is_none_and_a_black_one_paints_nothing(pipeline: Pipeline) -> None:
    start = {"init_image": painted(1), "strength": 0.8}
    white, none, black, other = pictures(
        pipeline,
        ask(**start, mask_image=WHITE),
        ask(**start),
        ask(**start, mask_image=BLACK),
        ask("a blue star", **start, mask_image=BLACK),
    )
    assert difference(white, none) <= TOLERANCE
    assert difference(black, other) <= TOLERANCE
    assert change(white, black) > NOTICED


def test_a_grey_mask_is_parted_in_the_middle(pipeline: Pipeline) -> None:
    start = {"init_image": painted(1), "strength": 0.8}
    for grey, plain in ((127, BLACK), (128, WHITE)):
        one, other = pictures(
            pipeline, ask(**start, mask_image=np.full_like(BLACK, grey)), ask(**start, mask_image=plain)
        )
        assert difference(one, other) <= TOLERANCE


def test_a_cancelled_run_holds_nothing(pipeline: Pipeline) -> None:
    visit = Visit(ask(guidance_scale=2.0, init_image=painted(1), strength=0.9, mask_image=WHITE), 0, 1)
    (run,) = together(pipeline, [visit])
    assert not run.done
    assert run.latents.numel() == run.times.numel() == 0
    assert (run.captions, run.negatives, run.kept, run.control, run.references) == ((), (), None, None, None)
