"""The dashboard over a fleet of three simulated workers and one of pico, under load."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import Page, expect

from common.schemas import TaskStatus
from tests.browser.conftest import Fleet, Visit
from tests.browser.test_fleet_page import submit
from tests.fleet import await_final, ready_workers, record
from tests.servers import GatewayServer, WorkerServer, eventually
from tests.tenants import bearer


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
    ids = [*submit(fleet, 20, steps=20), *submit(fleet, 2, model="pico", steps=8)]
    page = seen.page
    _cards_say_what_others_say(page, fleet, gateway)
    _cancel_and_retry(page, fleet, gateway, submit(fleet, 1, model="slow", steps=40)[0])
    ids += submit(fleet, 20)
    _pause(page, seen, fleet, ids)
    seen.go("Fleet")
    _charts_move(page)
    await_final(fleet.broker, ids)


def _cards_say_what_others_say(page: Page, fleet: Fleet, url: str) -> None:
    """RQ's command line and GET /api/workers."""
    expect(page.get_by_role("region", name="Workers").get_by_role("link").first).to_be_visible()  # of a run
    command = [sys.executable, "-m", "rq.cli", "info", "--raw", "--only-workers", "--serializer", "json", "--url"]
    told = subprocess.run(
        [*command, fleet.settings.redis_url], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    by_rq = {line.split()[1] for line in told.splitlines() if line.startswith("worker")}
    cards = requests.get(f"{url}/api/workers", headers=bearer(fleet.admin), timeout=10).json()["workers"]
    headings = page.get_by_role("region", name="Workers").get_by_role("heading", level=3)
    expect(headings).to_have_count(4)
    assert set(headings.all_inner_texts()) == by_rq == {card["name"] for card in cards}
    for card in cards:
        shown = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=card["name"]))
        expect(shown.get_by_role("list", name="Models")).to_have_text("".join(card["models"]))


def _cancel_and_retry(page: Page, fleet: Fleet, url: str, task_id: str) -> None:
    page.goto(f"{url}/#/tasks/{task_id}")
    page.get_by_role("button", name="Cancel").click()
    eventually(lambda: record(fleet.broker, task_id).status is TaskStatus.CANCELED)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_url(re.compile(rf"#/tasks/(?!{task_id})[0-9a-f]+"))
    again = page.url.rpartition("/")[2]
    assert record(fleet.broker, again).retry_of == task_id
    fleet.broker.cancel(again, "acme")  # it would take its time


def _pause(page: Page, seen: Visit, fleet: Fleet, ids: list[str]) -> None:
    seen.go("Operate")
    page.get_by_role("button", name="Pause the fleet").click()
    page.get_by_role("button", name="Resume the fleet").wait_for()
    time.sleep(2.0)
    waiting = fleet.broker.queues()
    time.sleep(0.7)
    assert [queue.queued for queue in fleet.broker.queues()] == [queue.queued for queue in waiting]
    assert any(record(fleet.broker, task_id).status is TaskStatus.QUEUED for task_id in ids)
    page.get_by_role("button", name="Resume the fleet").click()
    page.get_by_role("button", name="Pause the fleet").wait_for()


def _charts_move(page: Page) -> None:
    """A step of the history is ten seconds long."""
    plot = page.get_by_role("figure").filter(has_text="Throughput").get_by_role("img")
    expect(plot).to_have_accessible_name(re.compile(r"tasks: last .*, highest [1-9]"), timeout=25_000)
