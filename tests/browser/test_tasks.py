from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from playwright.sync_api import Page, expect

from common import keys
from tests.browser.conftest import SIZES, Fleet, Visit, asked_for_key
from tests.fleet import submit_many
from tests.servers import eventually
from tests.tenants import new_key, revoke
from zfleet.client import Client

VisitFn = Callable[..., Visit]


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    """A tenant that has nothing yet."""
    with Client(fleet.url, api_key=new_key(fleet.broker, "newcomer")) as client:
        yield client


def prompts(page: Page) -> list[str]:
    return page.get_by_role("listitem").get_by_role("link").all_inner_texts()


@pytest.mark.parametrize("size", list(SIZES))
def test_tasks_are_listed_newest_first_and_narrowed(visit: VisitFn, fleet: Fleet, size: str) -> None:
    tenant = f"narrow-{size}"
    with Client(fleet.url, api_key=new_key(fleet.broker, tenant)) as client:
        client.generate("first, 红色圆形", model="simulated", n=2)
        client.wait(client.submit("second [oom]", model="slow").task_id)
        client.generate("third", model="simulated")
    seen = visit(size)
    seen.open(fleet.admin, f"#/tasks?tenant={tenant}")
    page = seen.page
    expect(page.get_by_role("listitem")).to_have_count(3)
    facts = page.get_by_role("listitem").last.locator(".facts").bounding_box()
    assert facts is not None and facts["height"] < 45, "what a task is stands in a line, or on a phone in two"
    assert prompts(page) == ["third", "second [oom]", "first, 红色圆形"]
    expect(page.locator(".task img:visible")).to_have_count(2)
    expect(page.get_by_role("listitem").last).to_contain_text(f"simulated · 2 of 2 pictures · {tenant}")
    page.get_by_label("State").select_option("failed")
    expect(page.get_by_role("listitem")).to_have_count(1)
    assert page.url.endswith(f"#/tasks?status=failed&tenant={tenant}")
    page.reload()
    expect(page.get_by_label("State")).to_have_value("failed")
    expect(page.get_by_role("listitem")).to_have_count(1)
    page.get_by_label("State").select_option("")
    page.get_by_label("Model").select_option("simulated")
    expect(page.get_by_role("listitem")).to_have_count(2)
    page.go_back()
    expect(page.get_by_role("listitem")).to_have_count(3)
    page.get_by_label("Tenant").fill("nobody")
    page.get_by_label("Tenant").press("Enter")
    expect(page.get_by_text("No task is like that.")).to_be_visible()
    page.get_by_role("link", name="Show all").click()
    expect(page.get_by_role("listitem").first).to_be_visible()
    assert seen.sideways() == 0
    assert seen.nameless() == []
    page.get_by_label("Tenant").fill(tenant)
    page.get_by_label("Tenant").press("Enter")
    expect(page.get_by_role("listitem")).to_have_count(3)
    page.get_by_role("link", name="third").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Task ")


def test_what_is_on_screen_follows_the_fleet_and_keeps_the_focus(visit: VisitFn, fleet: Fleet, client: Client) -> None:
    first = client.submit("first", model="slow").task_id
    seen = visit()
    seen.open(new_key(fleet.broker, "newcomer"), "#/tasks")
    page = seen.page
    expect(page.get_by_role("listitem")).to_contain_text(["running"])
    link = page.get_by_role("link", name="first")
    link.focus()
    page.evaluate("window.kept = document.activeElement")
    client.generate("second", model="simulated")
    expect(page.get_by_role("listitem").nth(1)).to_contain_text("first")
    client.cancel(first)
    expect(page.get_by_role("listitem").nth(1)).to_contain_text("canceled")
    assert page.evaluate("document.activeElement === window.kept")
    expect(page.locator(".task img:visible")).to_have_count(1)


def test_a_long_list_comes_in_pages(visit: VisitFn, fleet: Fleet) -> None:
    for task_id in submit_many(fleet.broker, 60, model="slow", tenant="crowd"):
        fleet.broker.cancel(task_id, None)
    seen = visit("phone")
    seen.open(new_key(fleet.broker, "crowd"), "#/tasks")
    expect(seen.page.get_by_role("listitem")).to_have_count(50)
    seen.page.get_by_role("button", name="More").click()
    expect(seen.page.get_by_role("listitem")).to_have_count(60)
    expect(seen.page.get_by_role("button", name="More")).to_be_hidden()


@pytest.mark.parametrize("size", list(SIZES))
def test_a_gateway_that_is_away_is_said_so_and_asked_again(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen = visit(size)
    seen.expected.append("net::ERR_FAILED")
    seen.open(new_key(fleet.broker, "nobody-yet"), "#/tasks")
    seen.page.route("**/api/tasks?*", lambda route: route.abort())
    seen.page.get_by_label("State").select_option("failed")
    expect(seen.page.get_by_role("main").get_by_text("The gateway does not answer.")).to_be_visible()
    seen.page.unroute_all()
    seen.page.get_by_role("button", name="Try again").click()
    expect(seen.page.get_by_text("No task is like that.")).to_be_visible()
    seen.page.get_by_role("link", name="Show all").click()
    seen.page.get_by_role("link", name="Make the first one in the playground").click()
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("Playground")


def test_a_rare_state_is_looked_for_behind_very_many_tasks(visit: VisitFn, fleet: Fleet) -> None:
    tenant = "very-many"
    now, more_than_one_call_looks_through = int(time.time() * 1000), 1100
    with redis.Redis.from_url(fleet.settings.redis_url) as client, client.pipeline(transaction=False) as pipeline:
        for number in range(more_than_one_call_looks_through):
            task_id, status = f"{number:032x}", "succeeded" if number else "failed"
            record = {"status": status, "created_at": now, "tenant": tenant, "model": "simulated"}
            pipeline.hset(keys.TASK + task_id, mapping=record | {"request": '{"prompt": "the one"}'})
            pipeline.zadd(keys.TENANT_TASKS + tenant, {task_id: now + number})
        pipeline.execute()
    seen = visit()
    page = seen.page
    page.clock.install()
    seen.open(new_key(fleet.broker, tenant), "#/tasks?status=failed")
    expect(page.get_by_text("None of the newest tasks is like that.")).to_be_visible()
    page.clock.fast_forward(11_000)
    page.get_by_role("button", name="More").click()
    expect(page.get_by_role("link", name="the one")).to_be_visible()
    page.clock.fast_forward(11_000)
    expect(page.get_by_role("link", name="the one")).to_be_visible()


def test_ages_are_told_by_the_gateways_clock(visit: VisitFn, fleet: Fleet) -> None:
    key, seen = new_key(fleet.broker, "early"), visit()
    with Client(fleet.url, api_key=key) as client:
        client.generate("x", model="simulated")
    seen.page.clock.install(time=time.time() + 3 * 3600)
    seen.open(key, "#/tasks")
    assert seen.page.evaluate("Date.now()") > (time.time() + 2 * 3600) * 1000
    expect(seen.page.get_by_role("listitem")).to_contain_text(re.compile(r"just now|[0-9] s ago|min ago"))


def test_a_key_that_is_revoked_meanwhile_ends_the_page(visit: VisitFn, fleet: Fleet) -> None:
    key, seen = new_key(fleet.broker, "leaver"), visit()
    seen.page.clock.install()
    seen.open(key, "#/tasks")
    expect(seen.page.get_by_text("No tasks yet.")).to_be_visible()
    revoke(fleet.broker, key)
    eventually(lambda: asked_for_key(seen.page), within_s=30, every_s=0.2)
