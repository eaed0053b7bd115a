from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import inputs
from common.records import NewTask
from common.schemas import GenerateRequest
from tests.conftest import resolved


def test_a_handle_is_known_from_a_picture() -> None:
    handle = inputs.new_handle("acme")
    assert inputs.is_handle(handle) and handle != inputs.new_handle("acme")
    for text in ("", handle[:-1], handle + "0", handle.upper(), f"../{handle}", handle + "\n"):
        assert not inputs.is_handle(text)
    assert inputs.storage_key(handle) == f"inputs/{handle}.png"


def test_the_pictures_of_a_request_by_field() -> None:
    assert inputs.named(GenerateRequest(prompt="x")) == {}
    request = GenerateRequest(prompt="x", init_image="a", mask_image="b", reference_images=["c", "d"])
    assert inputs.named(request) == {"init_image": ["a"], "mask_image": ["b"], "reference_images": ["c", "d"]}
    assert inputs.named(resolved(control_image="a", reference_images=("b",))) == {
        "control_image": ["a"],
        "reference_images": ["b"],
    }


@pytest.mark.parametrize(
    ("steps", "strength", "done"), [(8, 1.0, 8), (8, 0.6, 5), (8, 0.5, 4), (8, 0.01, 1), (50, 0.3, 15), (1, 0.2, 1)]
)
def test_the_steps_that_a_strength_leaves(steps: int, strength: float, done: int) -> None:
    assert inputs.steps_done(steps, strength) == done


@given(steps=st.integers(1, 200), strength=st.floats(0, 1, exclude_min=True))
def test_there_is_a_step_to_do_but_for_what_floating_point_swallows(steps: int, strength: float) -> None:
    assert inputs.steps_done(steps, strength) >= (strength > 1e-15)
    assert inputs.steps_done(steps, strength) <= steps


def test_a_task_costs_the_steps_that_are_done() -> None:
    request = resolved(width=1000, height=1000, steps=10, n=2)
    assert NewTask(task_id="t", tenant="x", request=request).cost == 20
    half = request.model_copy(update={"strength": 0.5})
    assert NewTask(task_id="t", tenant="x", request=half).cost == 10
