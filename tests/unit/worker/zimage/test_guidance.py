"""Guidance: two items in one forward, as the stock call normalises and truncates it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.worker.zimage.driving import (
    NOTICED,
    TOLERANCE,
    Visit,
    ask,
    change,
    counted,
    difference,
    picture,
    pictures,
    together,
)
from tests.unit.worker.zimage.stock import Stock
from worker.pipelines.zimage import Pipeline
from worker.zimage.guidance import guide, guided_steps


@pytest.mark.parametrize("normalization", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("truncation", [0.0, 0.3, 1.0])
def test_guidance_equals_the_stock_call(
    pipeline: Pipeline, stock: Stock, normalization: float, truncation: float
) -> None:
    request = ask(
        negative_prompt="blurry", guidance_scale=3.0, cfg_normalization=normalization, cfg_truncation=truncation
    )
    assert difference(picture(pipeline, request), stock.picture(request)) <= TOLERANCE


def test_a_step_past_the_truncation_is_one_item(pipeline: Pipeline) -> None:
    # 1 - sigma before each of eight steps: 0, .045, .1, .17, .25, .36, .5, .7
    with counted(pipeline._parts.transformer) as items:
        together(pipeline, [Visit(ask(steps=8, guidance_scale=3.0, cfg_truncation=0.3))])
    assert items == [2, 2, 2, 2, 2, 1, 1, 1]


def test_a_step_at_the_truncation_is_guided() -> None:
    times = torch.tensor([0.0, 0.25, 0.5])
    assert guided_steps(ask(guidance_scale=1.0, cfg_truncation=0.25), times) == (True, True, False)
    assert guided_steps(ask(guidance_scale=0.0, cfg_truncation=0.25), times) == (False, False, False)


def test_without_guidance_a_step_is_one_item(pipeline: Pipeline) -> None:
    with counted(pipeline._parts.transformer) as items:
        together(pipeline, [Visit(ask(steps=8, negative_prompt="blurry", cfg_normalization=1.0, cfg_truncation=0.5))])
    assert items == [1] * 8


@pytest.mark.parametrize(
    ("negative", "scale", "told"), [("blurry", 0.0, True), ("blurry", 1.0, False), ("", 0.0, False), (None, 0.0, False)]
)
def test_a_negative_prompt_that_has_no_effect_is_told(
    pipeline: Pipeline, negative: str | None, scale: float, told: bool
) -> None:
    warnings = pipeline.start(ask(negative_prompt=negative, guidance_scale=scale)).warnings
    expected = "The negative prompt was left out, as there is no guidance; set guidance_scale above 0."
    assert warnings == ([expected] if told else [])


def test_guided_and_plain_runs_share_a_forward(pipeline: Pipeline) -> None:
    visits = [
        Visit(ask(steps=4)),
        Visit(ask(steps=1, width=128), 1),
        Visit(ask(steps=2, guidance_scale=1.0), 1),
        Visit(ask(steps=2, guidance_scale=1.0, cfg_truncation=0.1), 2),  # its times are 0 and .25
    ]
    with counted(pipeline._parts.transformer) as items:
        together(pipeline, visits)
    assert items == [1, 4, 5, 2]


def test_scale_normalization_and_truncation_change_the_picture(pipeline: Pipeline) -> None:
    guided = {"guidance_scale": 3.0, "negative_prompt": "a blue star"}
    plain, free, short, early, other = pictures(
        pipeline,
        ask(),
        ask(**guided),
        ask(**guided, cfg_normalization=0.7),
        ask(**guided, cfg_truncation=0.1),
        ask(**(guided | {"negative_prompt": "a green square"})),
    )
    for one in (plain, short, early, other):
        assert change(one, free) > NOTICED


def test_normalization_only_shortens() -> None:
    positive, negative = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    norm = torch.linalg.vector_norm
    free = guide(positive, negative, scale=3.0, normalization=0.0)
    short = guide(positive, negative, scale=3.0, normalization=0.5)
    assert norm(free) > norm(positive)
    torch.testing.assert_close(norm(short), 0.5 * norm(positive))
    torch.testing.assert_close(short / norm(short), free / norm(free))
    assert torch.equal(guide(positive, negative, scale=3.0, normalization=100.0), free)
    assert torch.equal(guide(0 * positive, 0 * negative, scale=3.0, normalization=1.0), 0 * positive)
