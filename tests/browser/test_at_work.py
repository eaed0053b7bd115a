"""The dashboard over a fleet of three simulated workers and one of pico, under load."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
import requests
from playwright.sync_api import Locator, Page, expect

from common.cards import WorkerCard
from common.schemas import TaskStatus
from tests.browser.conftest import Fleet, Visit
from tests.browser.test_fleet_page import card_of, submit
from tests.fleet import await_final, ready_workers, record
from tests.servers import GatewayServer, WorkerServer, eventually
from tests.tenants import bearer

STOPS_WITHIN = timedelta(seconds=2)


@pytest.fixture(scope="module")
def gateway(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that knows both models, and the two workers that the fleet has not."""
    folder = tmp_path_factory.mktemp("at-work")
    one = fleet.settings.model_copy(update={"workers_per_device": 1})
    pico = one.model_copy(update={"models": ("pico",)})
    both = one.model_copy(update={"models": (*fleet.settings.models, "pico")})
    with (
        WorkerServer(pico, folder / "pico.log"),
        WorkerServer(one, folder / "third.log"),
        GatewayServer(both, folder / "gateway.log") as server,
    ):
        ready_workers(fleet.broker, 4)
        yield server.url


def test_the_dashboard_of_a_fleet_at_work(visit: Callable[..., Visit], fleet: Fleet, gateway: str) -> None:
    seen = visit()
    seen.url = gateway
    seen.open(fleet.admin, "#/fleet")
    (long,) = submit(fleet, 1, model="slow", steps=40)  # so that there is a run to be seen
    ids = [*submit(fleet, 20, steps=20), *submit(fleet, 2, model="pico", steps=8)]
    page = seen.page
    drawn = _drawn(page)
    _cards_say_what_others_say(page, fleet, gateway)
    _cancel_and_retry(page, fleet, gateway, long)
    ids += _pause(page, seen, fleet)
    _paused_cards_say_what_others_say(page, seen, fleet, gateway)
    _go_on(page, seen)
    seen.go("Fleet")
    _charts_move(page, drawn)
    await_final(fleet.broker, ids)


def _cards_say_what_others_say(page: Page, fleet: Fleet, url: str) -> None:
    """RQ's command line and GET /api/workers."""
    expect(page.get_by_role("region", name="Workers").get_by_role("link").first).to_be_visible()  # of a run
    by_rq, cards = _told_by_rq(fleet), _told_by_api(fleet, url)
    headings = _headings(page)
    assert set(headings.all_inner_texts()) == by_rq.keys() == {card.name for card in cards}
    for card in cards:
        shown = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=card.name))
        expect(shown.get_by_role("list", name="Models")).to_have_text("".join(card.models))


def _cancel_and_retry(page: Page, fleet: Fleet, url: str, task_id: str) -> None:
    page.goto(f"{url}/#/tasks/{task_id}")
    page.get_by_role("button", name="Cancel").click()
    eventually(lambda: record(fleet.broker, task_id).status is TaskStatus.CANCELED)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_url(re.compile(rf"#/tasks/(?!{task_id})[0-9a-f]+"))
    again = page.url.rpartition("/")[2]
    assert record(fleet.broker, again).retry_of == task_id
    fleet.broker.cancel(again, "acme")  # it would take its time


def _pause(page: Page, seen: Visit, fleet: Fleet) -> list[str]:
    """Pause while there is plenty to claim, and see claims stop within two seconds; return the tasks' ids."""
    seen.go("Operate")
    button = page.get_by_role("button", name="Pause the fleet")
    expect(button).to_be_visible()
    ids = submit(fleet, 30)
    pressed = datetime.now(UTC)
    button.click()
    page.get_by_role("button", name="Resume the fleet").wait_for()
    time.sleep(STOPS_WITHIN.total_seconds() + 0.7)
    began = [task.started_at for task in (record(fleet.broker, task_id) for task_id in ids) if task.started_at]
    assert len(began) < len(ids), "more would have begun"
    assert max(began, default=pressed) < pressed + STOPS_WITHIN
    return ids


def _paused_cards_say_what_others_say(page: Page, seen: Visit, fleet: Fleet, url: str) -> None:
    """Nothing begins, so that what each of them says at its own moment can be compared."""
    seen.go("Fleet")
    _headings(page)

    def others() -> dict[str, list[str]]:
        by_rq, cards = _told_by_rq(fleet), _told_by_api(fleet, url)
        return {card.name: [by_rq[card.name], f"{card.images_done:,}", f"0 of {card.capacity}"] for card in cards}

    def cards() -> dict[str, list[str]]:
        shown = {card.name: card_of(page, card) for card in fleet.broker.workers()}
        return {name: [state, images, runs] for name, (state, images, _, runs) in shown.items()}

    eventually(lambda: cards() == others(), within_s=20.0)


def _go_on(page: Page, seen: Visit) -> None:
    seen.go("Operate")
    page.get_by_role("button", name="Resume the fleet").click()
    page.get_by_role("button", name="Pause the fleet").wait_for()


def _headings(page: Page) -> Locator:
    """The names on the cards, once all four are there."""
    headings = page.get_by_role("region", name="Workers").get_by_role("heading", level=3)
    expect(headings).to_have_count(4)
    return headings


def _told_by_rq(fleet: Fleet) -> dict[str, str]:
    """The workers' states, as `rq info` prints them."""
    command = [sys.executable, "-m", "rq.cli", "info", "--raw", "--only-workers", "--serializer", "json", "--url"]
    told = subprocess.run(
        [*command, fleet.settings.redis_url], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return dict(re.findall(r"^worker (\S+) \(.*?\) (\w+) ", told, re.MULTILINE))


def _told_by_api(fleet: Fleet, url: str) -> list[WorkerCard]:
    """The workers as GET /api/workers has them."""
    answer = requests.get(f"{url}/api/workers", headers=bearer(fleet.admin), timeout=10).json()
    return [WorkerCard.model_validate(card) for card in answer["workers"]]


def _charts_move(page: Page, before: str) -> None:
    """A step of the history is ten seconds long."""
    expect(_throughput(page)).to_have_accessible_name(re.compile(r"tasks: last .*, highest [1-9]"), timeout=25_000)
    eventually(lambda: _drawn(page) != before, within_s=25.0)


def _drawn(page: Page) -> str:
    """What the chart of throughput shows."""
    return _throughput(page).inner_html()


def _throughput(page: Page) -> Locator:
    return page.get_by_role("figure").filter(has_text="Throughput").get_by_role("img")
