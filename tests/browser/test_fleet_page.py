"""The page Fleet over a real fleet: what it shows is what the API and RQ's own tools say."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis
from playwright.sync_api import Page, expect
from rq import Queue, Worker, suspension
from rq.serializers import JSONSerializer

from common.cards import WorkerCard
from common.records import NewTask
from tests.browser.conftest import SIZES, Fleet, Visit, asked_for_key
from tests.conftest import resolved
from tests.fleet import await_final
from tests.servers import eventually
from tests.tenants import new_key, revoke


@contextmanager
def rq_of(fleet: Fleet) -> Iterator[redis.Redis]:
    """The connection that RQ's own tools would have."""
    with redis.Redis.from_url(fleet.settings.redis_url) as connection:
        yield connection


def submit(fleet: Fleet, count: int, **changes: object) -> list[str]:
    """Submit so many tasks of the tenant `acme`; return their ids."""
    ids = [secrets.token_hex(16) for _ in range(count)]
    for task_id in ids:
        fleet.broker.submit(NewTask(task_id=task_id, tenant="acme", request=resolved(**changes)))
    return ids


def told(page: Page) -> dict[str, list[str]]:
    """What the table of queues says: by model and priority, how many wait and how many run."""
    rows = page.get_by_role("region", name="Queues").get_by_role("row").all()[1:]
    cells = [row.get_by_role("cell").all_inner_texts() for row in rows]
    models = [row.get_by_role("rowheader").inner_text() for row in rows]
    return {f"{model}.{priority}": counts[:2] for model, (priority, *counts) in zip(models, cells, strict=True)}


def counted(connection: redis.Redis) -> dict[str, list[str]]:
    """The same from RQ, all tenants together; nothing of queues that are empty."""
    waiting: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for queue in Queue.all(connection=connection, serializer=JSONSerializer):
        line = queue.name.rpartition(".")[0]
        waiting[line] += queue.count
        running[line] += queue.started_job_registry.count
    return {line: [str(waiting[line]), str(running[line])] for line in waiting}


def card_of(page: Page, worker: WorkerCard) -> list[str]:
    """What the card of a worker says: device, images, memory, state."""
    card = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=worker.name))
    facts = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
    return [card.locator("header .tag").inner_text(), facts["Images"], facts["Memory"], facts["Runs"]]


@pytest.mark.parametrize("size", list(SIZES))
def test_cards_and_tables_say_what_the_api_and_rq_say(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    with rq_of(fleet) as connection:
        suspension.suspend(connection)
        seen = visit(size)
        seen.open(fleet.admin, "#/fleet")
        page = seen.page
        verdict = page.get_by_role("status", name="Verdict")
        expect(verdict).to_contain_text("The fleet is paused")
        ids = submit(fleet, 3) + submit(fleet, 2, priority="high")
        expect(page.locator(".tile").first).to_contain_text("5")
        assert told(page)["simulated.high"] == ["2", "0"]
        assert told(page)["simulated.normal"] == ["3", "0"]
        assert told(page).items() <= counted(connection).items()
        names = page.get_by_role("region", name="Workers").get_by_role("heading", level=3)
        assert set(names.all_inner_texts()) == {worker.name for worker in Worker.all(connection=connection)}
        suspension.resume(connection)
        expect(verdict).to_contain_text(re.compile("Healthy 2 workers, with simulated.* in memory"))
        await_final(fleet.broker, ids)
        expect(page.locator(".tile").first).to_contain_text("0")

    def alike() -> bool:
        cards = fleet.broker.workers()
        return {card.name: card_of(page, card) for card in cards} == {
            card.name: ["idle", f"{card.images_done:,}", f"{card.rss_mb} MiB", "0 of 1"] for card in cards
        }

    eventually(alike, within_s=8.0)  # a card is new every 3 s
    assert (seen.sideways(), seen.nameless()) == (0, [])


@pytest.mark.parametrize("size", list(SIZES))
def test_runs_show_their_steps_as_they_go(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    seen = visit(size)
    seen.open(fleet.admin, "#/fleet")
    (task_id,) = submit(fleet, 1, model="slow", steps=40)
    bar = seen.page.get_by_role("progressbar", name=f"Task {task_id[:8]}")
    expect(bar).to_have_attribute("max", "40")
    expect(seen.page.get_by_role("region", name="Workers")).to_contain_text("slow · acme")
    step = bar.evaluate("bar => bar.value")
    eventually(lambda: bar.evaluate("bar => bar.value") > step)
    seen.page.get_by_role("link", name=task_id[:8]).click()
    expect(seen.page.get_by_role("heading", level=1)).to_contain_text(task_id)
    seen.page.go_back()
    expect(bar).to_be_visible()
    fleet.broker.cancel(task_id, "acme")
    expect(bar).to_have_count(0)


def test_a_key_that_is_revoked_ends_in_asking_for_one(visit: Callable[..., Visit], fleet: Fleet) -> None:
    key = new_key(fleet.broker, "passing", admin=True)
    seen = visit()
    seen.page.clock.install()
    seen.open(key, "#/fleet")
    expect(seen.page.get_by_text("live", exact=True)).to_be_visible()
    revoke(fleet.broker, key)
    eventually(lambda: asked_for_key(seen.page), within_s=30, every_s=0.2)
