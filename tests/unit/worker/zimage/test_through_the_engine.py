"""Whatever the engine is offered, in whatever order, and whoever leaves: each picture equals the stock call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models import Catalogue
from common.records import Claimed
from tests.conftest import resolved
from tests.miniatures import PICO
from tests.unit.worker.zimage.drawing import requests, steady
from tests.unit.worker.zimage.driving import ask, masked, painted
from tests.unit.worker.zimage.stock import Stock
from worker.engine import Engine
from worker.held import HeldTask
from worker.pipelines.base import ImageRequest
from worker.residency import Residency

pytestmark = pytest.mark.usefixtures("one_thread")

TWIN = PICO.model_copy(update={"name": "twin"})
GIVEN = ("init_image", "mask_image")


class Order(NamedTuple):
    """A task: its first picture, how many, before which turn it comes, and how many turns later it is cancelled."""

    request: ImageRequest
    n: int = 1
    turn: int = 0
    cancelled_after: int | None = None
    model: str = PICO.name


ORDERS = st.builds(
    Order,
    requests("text", "image", "inpaint"),
    n=st.sampled_from((1, 1, 2)),
    turn=st.integers(0, 5),
    cancelled_after=st.sampled_from((None, None, None, 0, 1, 3)),
    model=st.sampled_from((PICO.name, PICO.name, PICO.name, TWIN.name)),
)


@pytest.fixture(scope="module")
def residency(one_thread: None) -> Residency:
    made = Residency(Catalogue([PICO, TWIN]), device="cpu", max_resident=1)
    made.prewarm()
    return made


def held(order: Order, index: int) -> HeldTask:
    """Return the task as a worker holds it once its pictures are read."""
    asked = {field.name: getattr(order.request, field.name) for field in dataclasses.fields(order.request)}
    given = {name: (asked[name],) for name in GIVEN if asked[name] is not None}
    plain = {name: asked[name] for name in asked if name not in (*GIVEN, "control_image", "reference_images", "loras")}
    request = resolved(**plain, n=order.n, model=order.model)
    claimed = Claimed(
        task_id=f"task{index}", fence=1, queue="q", request=request, request_id="", queued_ms=0, deadline_in_s=None
    )
    return HeldTask(claimed=claimed, deadline=None, inputs=given)


def run(residency: Residency, orders: Sequence[Order], limit: int) -> list[HeldTask]:
    """Have one engine make them all, so many at once at most; return the tasks in order."""
    retired: list[HeldTask] = []

    def retire(task: HeldTask) -> None:
        retired.append(task)
        task.stored = True

    engine = Engine(models=residency, batch_limits={PICO.name: limit, TWIN.name: limit}, retire=retire)
    tasks = [held(order, index) for index, order in enumerate(orders)]
    for turn in range(1000):
        for order, task in zip(orders, tasks, strict=True):
            if turn == order.turn:
                engine.offer(task)
            if order.cancelled_after is not None and turn == order.turn + order.cancelled_after:
                task.verdict = "cancel"
        busy = engine.turn(0)
        if not busy and engine.idle and len(retired) == len(tasks):
            return tasks
    raise AssertionError("some task never ends")


def check(stock: Stock, orders: Sequence[Order], tasks: Sequence[HeldTask]) -> None:
    for order, task in zip(orders, tasks, strict=True):
        assert task.outcome == "succeeded" or (order.cancelled_after is not None and task.outcome == "canceled"), order
        assert sorted(task.pixels) == (list(range(order.n)) if task.outcome == "succeeded" else [])
        for index, made in task.pixels.items():
            expected = stock.picture(dataclasses.replace(order.request, seed=order.request.seed + index))
            assert np.abs(made / 255 - expected).max() <= 1 / 255, (order, index)


@settings(steady, max_examples=8)
@given(orders=st.lists(ORDERS, min_size=2, max_size=4), limit=st.sampled_from((1, 2, 3, 8)))
def test_each_picture_equals_the_stock_call(
    residency: Residency, stock: Stock, orders: list[Order], limit: int
) -> None:
    check(stock, orders, run(residency, orders, limit))


def test_also_where_models_make_way_for_each_other_in_between(residency: Residency, stock: Stock) -> None:
    start = {"init_image": painted(1), "strength": 0.8}
    orders = [
        Order(ask(seed=1), n=2),
        Order(ask(seed=3, **start, mask_image=masked(2)), model=TWIN.name, turn=1),
        Order(ask(seed=4, guidance_scale=2.0), turn=2, cancelled_after=1),
        Order(ask(seed=5, guidance_scale=2.0, negative_prompt="blurry"), turn=2),
        Order(ask(seed=6, **start), model=TWIN.name, turn=3),
    ]
    before = residency.counters()["models_unloaded_total"]
    check(stock, orders, run(residency, orders, 3))
    assert residency.counters()["models_unloaded_total"] - before >= 3
