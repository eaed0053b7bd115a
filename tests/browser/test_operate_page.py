"""The page Operate over a real fleet: each button does what it says, and says how it went."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Locator, Page, Route, expect
from rq import suspension

from common.schemas import TaskStatus
from tests.browser.conftest import SIZES, Fleet, Visit
from tests.browser.states import Stage, fleet_of, worker
from tests.browser.test_fleet_page import rq_of, submit
from tests.fleet import await_final, ready_workers, record
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def operate(visit: Callable[..., Visit], fleet: Fleet) -> Iterator[Callable[..., Page]]:
    """Open the page Operate in a window of this size. Afterwards the fleet goes on, whatever became of the test."""

    def opened(size: str = "desktop") -> Page:
        seen = visit(size)
        seen.open(fleet.admin, "#/operate")
        expect(seen.page.get_by_role("status").first).to_have_text("live")
        assert seen.nameless() == []
        return seen.page

    yield opened
    fleet.broker.resume()
    for slot in fleet.broker.drained():
        fleet.broker.undrain_slot(slot)


def section(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def told(part: Locator) -> Locator:
    """The line in which a section says how something went."""
    return part.locator("p.outcome")


@pytest.mark.parametrize("size", list(SIZES))
def test_the_fleet_is_paused_and_goes_on(operate: Callable[..., Page], fleet: Fleet, size: str) -> None:
    page = operate(size)
    part = section(page, "Fleet")
    expect(part).to_contain_text("Running")
    part.get_by_role("button", name="Pause the fleet").press("Enter")
    expect(told(part)).to_have_text("The fleet is paused: no task is begun until it is resumed.")
    expect(part.get_by_role("button", name="Resume the fleet")).to_be_focused()
    with rq_of(fleet) as connection:
        assert suspension.is_suspended(connection)
        part.get_by_role("button", name="Resume the fleet").press("Enter")
        expect(part).to_contain_text("Running")
        assert not suspension.is_suspended(connection)
        suspension.suspend(connection)  # by RQ's own tools: the page shows it
        expect(part).to_contain_text("Paused")
        suspension.resume(connection)
    expect(part.get_by_role("button", name="Pause the fleet")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("size", list(SIZES))
def test_a_worker_is_drained_and_works_again(operate: Callable[..., Page], fleet: Fleet, size: str) -> None:
    page = operate(size)
    part = section(page, "Workers")
    name, other = (card.name for card in ready_workers(fleet.broker, 2)[:2])
    part.get_by_role("button", name=f"Drain {name}").click()
    expect(told(part)).to_have_text(f"{name} claims nothing more until it is resumed.")
    expect(part.get_by_role("listitem").filter(has_text=name)).to_contain_text("drained")
    tasks = await_final(fleet.broker, submit(fleet, 4))
    assert {task.attempts[0].worker for task in tasks} == {other}
    part.get_by_role("button", name=f"Resume {name}").click()
    expect(told(part)).to_have_text(f"{name} takes tasks again.")
    expect(part.get_by_role("button", name=f"Drain {name}")).to_be_visible()


def test_a_drained_place_without_a_worker_is_shown_until_it_is_resumed(
    operate: Callable[..., Page], fleet: Fleet
) -> None:
    fleet.broker.drain("sold.gpu0.abc123")
    part = section(operate(), "Workers")
    place = part.get_by_role("listitem").filter(has_text="sold.gpu0")
    expect(place).to_contain_text("No worker is there")
    expect(place.get_by_role("button")).to_have_text(["Resume"])
    place.get_by_role("button").click()
    expect(told(part)).to_have_text("sold.gpu0 takes tasks again.")
    expect(place).to_have_count(0)
    assert fleet.broker.drained() == set()


@pytest.mark.parametrize("size", list(SIZES))
def test_a_worker_is_started_anew(operate: Callable[..., Page], fleet: Fleet, size: str) -> None:
    page = operate(size)
    part = section(page, "Workers")
    card = ready_workers(fleet.broker, 2)[0]
    part.get_by_role("button", name=f"Restart {card.name}").click()
    dialog = page.get_by_role("dialog", name=f"Restart {card.name}?")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(part.get_by_role("button", name=f"Restart {card.name}")).to_be_focused()
    part.get_by_role("button", name=f"Restart {card.name}").click()
    dialog.get_by_role("button", name="Restart").click()
    expect(told(part)).to_contain_text("is started anew.")
    slot = card.name.rpartition(".")[0]
    expect(
        part.get_by_role("button", name=re.compile(rf"Restart {slot}\.(?!{card.name.rpartition('.')[2]})"))
    ).to_be_visible(timeout=20_000)
    ready_workers(fleet.broker, 2)


@pytest.fixture
def failed(fleet: Fleet) -> list[str]:
    """Three tasks that a worker has failed, which the others would not have."""
    for card in fleet.broker.workers():
        fleet.broker.drain(card.name)
    ids = submit(fleet, 3)
    worker = FakeWorker(fleet.broker, name="elsewhere.gpu0.abc123")
    for task in worker.take(3):
        worker.fail(task)
    assert {record(fleet.broker, task_id).status for task_id in ids} == {TaskStatus.FAILED}
    for card in fleet.broker.workers():
        fleet.broker.undrain(card.name)
    return ids


@pytest.mark.parametrize("size", list(SIZES))
def test_failed_tasks_are_requeued_and_purged(
    operate: Callable[..., Page], fleet: Fleet, failed: list[str], size: str
) -> None:
    page = operate(size)
    part = section(page, "Failed tasks")
    part.get_by_label("Tenant").fill("acme")
    part.get_by_label("Model").select_option("simulated")
    part.get_by_role("button", name="Requeue …").click()
    dialog = page.get_by_role("dialog", name="Requeue 3 tasks of simulated of the tenant acme?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(told(part)).to_have_text("Nothing was changed.")
    part.get_by_role("button", name="Requeue …").click()
    dialog.get_by_role("button", name="Requeue").click()
    expect(told(part)).to_have_text("3 tasks requeued.")
    newest, _ = fleet.broker.tasks("acme", status=None, limit=3, before=None)
    assert {task.retry_of for task in newest} == set(failed)
    done = await_final(fleet.broker, [task.task_id for task in newest])
    assert {task.status for task in done} == {TaskStatus.SUCCEEDED}
    part.get_by_role("button", name="Purge …").click()
    dialog = page.get_by_role("dialog", name="Purge 3 tasks of simulated of the tenant acme?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    dialog.get_by_role("button", name="Purge").click()
    expect(told(part)).to_have_text("3 tasks purged.")
    assert [fleet.broker.view(task_id) for task_id in failed] == [None] * 3
    part.get_by_role("button", name="Purge …").click()
    expect(told(part)).to_have_text("There are none.")


REFUSED = [{"task_id": "a" * 32, "code": "input_gone", "detail": "its picture is gone"}]
MADE = [{"task_id": "b" * 32, "new_task_id": "c" * 32}]


def requeueing(visit: Callable[..., Visit], fleet: Fleet, answer: Callable[[Route], None], size: str) -> Visit:
    """Begin to requeue what the gateway is said to have."""
    seen = visit(size)
    seen.page.route("**/api/tasks?*", lambda route: route.fulfill(json={"tasks": [{}], "next_cursor": None}))
    seen.page.route("**/api/failed/requeue", answer)
    seen.open(fleet.admin, "#/operate")
    seen.page.get_by_role("button", name="Requeue …").click()
    seen.page.get_by_role("dialog", name="Requeue 2 tasks?").get_by_role("button", name="Requeue").click()
    return seen


def test_requeueing_goes_on_where_it_left_off(visit: Callable[..., Visit], fleet: Fleet) -> None:
    batches = iter([
        {"requeued": MADE, "refused": REFUSED, "more": bool(cursor), "next_cursor": cursor}
        for cursor in ("1/q/t", None)
    ])  # fmt: skip
    asked: list[object] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(json=next(batches))

    seen = requeueing(visit, fleet, answer, "desktop")
    expect(seen.page.get_by_text("2 tasks requeued. 1 task cannot be: its picture is gone.")).to_be_visible()
    assert asked == [{"limit": 100}, {"limit": 100, "cursor": "1/q/t"}]


@pytest.mark.parametrize("size", list(SIZES))
def test_requeueing_is_stopped(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    answers = {"requeued": MADE, "refused": REFUSED, "more": True, "next_cursor": "1/q/t"}
    seen = requeueing(visit, fleet, lambda route: route.fulfill(json=answers), size)
    dialog = seen.page.get_by_role("dialog", name="Requeue 2 tasks?")
    expect(dialog.get_by_role("status")).to_have_text(re.compile("[0-9]{2} requeued"))
    dialog.get_by_role("button", name="Stop").click()
    expect(told(section(seen.page, "Failed tasks"))).to_have_text(
        re.compile("[0-9]+ tasks requeued, then stopped. 1 task cannot be: its picture is gone.")
    )
    assert (seen.sideways(), seen.nameless()) == (0, [])


def test_a_fleet_without_redis_is_said_to_be_unhealthy(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    stage = Stage(seen.page)
    seen.open(fleet.admin, "#/operate")
    stage.tell(fleet_of(worker()))
    expect(seen.page.get_by_text("Workers take tasks as they come.")).to_be_visible()
    verdict = seen.page.get_by_role("status", name="Verdict")
    expect(verdict).to_be_hidden()
    stage.tell(fleet_of(worker(), status="unhealthy", reasons=("Redis does not answer",)))
    expect(verdict).to_contain_text("Redis does not answer")
    stage.tell(fleet_of(worker()))
    expect(verdict).to_be_hidden()
