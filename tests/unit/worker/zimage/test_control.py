"""ControlNet: what a control picture does equals the stock call, and shares the forward with what has none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings

from tests.miniatures import REFINERS, control_checkpoint
from tests.unit.worker.zimage.drawing import mixes, steady
from tests.unit.worker.zimage.driving import (
    NOTICED,
    TOLERANCE,
    Visit,
    ask,
    change,
    counted,
    difference,
    load,
    masked,
    painted,
    picture,
    pictures,
    together,
)
from tests.unit.worker.zimage.stock import Stock
from worker.pipelines.zimage import Pipeline

VERSIONS = [(refiner, channels) for refiner in REFINERS for channels in (16, 33)]
CONTROLLED = ask(control_image=painted(1), control_scale=0.5)


@dataclass
class Both:
    """One ControlNet in the batched pipeline and in the stock ones."""

    pipeline: Pipeline
    stock: Stock


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"{version[0]}-{version[1]}")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Both:
    refiner, channels = request.param
    spec = control_checkpoint(tmp_path_factory.mktemp("control"), refiner, channels=channels)
    return Both(load(spec), Stock(spec))


@pytest.mark.timeout(300)
@settings(steady, max_examples=8)
@given(visits=mixes("control", "control", "text", "image", "inpaint"))
def test_in_any_company_a_picture_equals_the_stock_call(both: Both, visits: list[Visit]) -> None:
    for visit, run in zip(visits, together(both.pipeline, visits), strict=True):
        if run.captions:
            expected = both.stock.picture(visit.request)
            assert difference(both.pipeline.decode(run).numpy(), expected) <= TOLERANCE, visit


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_a_picture_made_alone_equals_the_stock_call(both: Both, scale: float) -> None:
    request = ask(steps=2, control_image=painted(1), control_scale=scale, guidance_scale=2.0, negative_prompt="grey")
    assert difference(picture(both.pipeline, request), both.stock.picture(request)) <= TOLERANCE


def test_every_condition_changes_the_picture(both: Both) -> None:
    made = pictures(
        both.pipeline,
        ask(),
        CONTROLLED,
        ask(control_image=painted(1), control_scale=0.8),
        ask(control_image=painted(2), control_scale=0.5),
    )
    for index, one in enumerate(made):
        for other in made[:index]:
            assert change(one, other) > NOTICED


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Pipeline:
    return load(control_checkpoint(tmp_path_factory.mktemp("one"), "control_noise_refiner"))


def test_controlled_and_plain_runs_share_a_forward_and_controlled_ones_the_controlnet(pipeline: Pipeline) -> None:
    visits = [
        Visit(ask(steps=4)),
        Visit(CONTROLLED, 1),
        Visit(ask(steps=2, width=64, control_image=painted(2, width=64), control_scale=0.2, guidance_scale=2.0), 1),
        Visit(ask(steps=1, width=128), 2),
    ]
    with counted(pipeline._parts.transformer) as whole, counted(pipeline._parts.controlnet) as controlled:
        together(pipeline, visits)
    assert whole == [1, 4, 5, 2]
    assert controlled == [3, 3, 1]


def test_plain_runs_never_ask_the_controlnet(pipeline: Pipeline) -> None:
    with counted(pipeline._parts.controlnet) as items:
        together(pipeline, [Visit(ask()), Visit(ask(init_image=painted(1), strength=0.5))])
    assert items == []


def test_each_run_has_a_scale_of_its_own(pipeline: Pipeline) -> None:
    requests = [ask(control_image=painted(1), control_scale=scale) for scale in (0.1, 0.5, 1.0)]
    for request, made in zip(requests, pictures(pipeline, *requests), strict=True):
        assert difference(made, picture(pipeline, request)) <= TOLERANCE


def test_control_goes_with_a_picture_to_start_from(pipeline: Pipeline) -> None:
    """There is no stock call for both, so what is compared is company with being alone, and each with neither."""
    start = {"init_image": painted(3), "strength": 0.8, "mask_image": masked(3)}
    control = {"control_image": painted(1), "control_scale": 0.5}
    requests = [ask(**start, **control), ask(**start), ask(**control)]
    made = pictures(pipeline, *requests)
    assert difference(made[0], picture(pipeline, requests[0])) <= TOLERANCE
    assert all(change(made[0], other) > NOTICED for other in made[1:])


def test_a_cancelled_run_drops_its_control(pipeline: Pipeline) -> None:
    gone, kept = together(pipeline, [Visit(CONTROLLED, 0, 1), Visit(CONTROLLED)])
    assert (gone.control, gone.step) == (None, 1)
    assert difference(pipeline.decode(kept).numpy(), picture(pipeline, CONTROLLED)) <= TOLERANCE
