from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import SIZES, Fleet, Visit
from zfleet.client import Client

VisitFn = Callable[..., Visit]


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    with Client(fleet.url, api_key=fleet.tenant) as client:
        yield client


@pytest.mark.parametrize("size", list(SIZES))
def test_a_finished_task_shows_its_picture_times_attempts_and_request(
    visit: VisitFn, fleet: Fleet, client: Client, size: str
) -> None:
    done = client.generate("a 'red' <circle>", seed=5, n=2, negative_prompt="blue", metadata={"order": "17"})
    task_id = done.view.task_id
    seen = visit(size)
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    page = seen.page
    expect(page.locator(".state")).to_have_text("succeeded")
    pictures = page.get_by_role("img", name="a 'red' <circle>")
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_have_js_property("naturalWidth", 64)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").nth(1).click()
    assert download.value.suggested_filename == f"{task_id}-1.webp"
    assert download.value.path().read_bytes() == done.images[1]
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open").first.click()
    opened.value.close()
    stages = page.get_by_role("region", name="Time").get_by_role("rowheader")
    expect(stages).to_contain_text(["queued", "attempt 1", "denoise", "store", "total"])
    attempts = page.get_by_role("region", name="Attempts").get_by_role("row")
    expect(attempts).to_have_count(2)
    expect(attempts.nth(1)).to_contain_text(done.view.attempts[0].worker)
    request = page.get_by_role("region", name="Request")
    for text in ("Not: blue", "64 × 64", "metadata order"):
        expect(request).to_contain_text(text)
    expect(page.get_by_role("button", name=re.compile("Cancel|Retry"))).to_have_count(0)
    assert seen.sideways() == 0


@pytest.mark.parametrize("size", list(SIZES))
def test_a_running_task_shows_steps_and_previews_and_is_canceled(
    visit: VisitFn, fleet: Fleet, client: Client, size: str
) -> None:
    task_id = client.submit("a red circle", model="slow", preview=True).task_id
    seen = visit(size)
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    page = seen.page
    expect(page.get_by_role("img", name="Preview of the picture")).to_have_js_property("naturalWidth", 8)
    expect(page.get_by_text(re.compile("Step [0-9]+ of 40"))).to_be_visible()
    assert 0 < float(page.get_by_role("progressbar").evaluate("bar => bar.value")) < 40
    assert seen.nameless() == []
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator(".state")).to_have_text("canceled")
    expect(page.get_by_role("button", name="Retry")).to_be_focused()
    expect(page.get_by_role("progressbar")).to_be_hidden()
    assert client.status(task_id).status == "canceled"


@pytest.mark.parametrize("size", list(SIZES))
def test_a_failed_task_says_why_and_is_tried_again(visit: VisitFn, fleet: Fleet, client: Client, size: str) -> None:
    task_id = client.submit("too much [oom]", model="slow").task_id
    client.wait(task_id)
    seen = visit(size)
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    page = seen.page
    expect(page.get_by_role("heading", name="out_of_memory")).to_be_visible()
    expect(page.get_by_text("may succeed later")).to_be_visible()
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("heading", level=1)).not_to_contain_text(task_id)
    page.get_by_role("link", name=task_id[:8]).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(task_id)


def test_a_task_that_waits_shows_its_place_and_expires(visit: VisitFn, fleet: Fleet, client: Client) -> None:
    before = [client.submit("first", model="slow").task_id for _ in range(4)]
    task_id = client.submit("late", model="slow", deadline_s=2.5).task_id
    seen = visit()
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    expect(seen.page.get_by_text(re.compile("before it in line|Next in line"))).to_be_visible()
    expect(seen.page.locator(".state")).to_have_text("expired")
    expect(seen.page.get_by_text("Its deadline passed")).to_be_visible()
    for other in before:
        fleet.broker.cancel(other, None)


def test_try_in_playground_fills_in_the_request(visit: VisitFn, fleet: Fleet, client: Client) -> None:
    done = client.generate("一个红色圆形\n'quoted'", seed=11, steps=3, width=96, height=48, format="png")
    seen = visit()
    seen.open(fleet.tenant, f"#/tasks/{done.view.task_id}")
    page = seen.page
    page.get_by_role("link", name="Try in playground").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("一个红色圆形\n'quoted'")
    for label, value in (("Steps", "3"), ("Size", "96x48"), ("Seed", "11"), ("Format", "png")):
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_role("link", name="Download")).to_be_visible()


def test_a_task_that_is_not_there_is_said_so(visit: VisitFn, fleet: Fleet) -> None:
    seen = visit()
    seen.expected.append("status of 404")
    seen.open(fleet.tenant, f"#/tasks/{'0' * 32}")
    expect(seen.page.get_by_text("no task has this id")).to_be_visible()
    seen.page.get_by_role("link", name="All tasks").click()
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("Tasks")


@pytest.mark.parametrize("page", ["tasks/", "playground?task="])
def test_a_page_that_hears_nothing_of_its_task_says_so(visit: VisitFn, fleet: Fleet, client: Client, page: str) -> None:
    task_id = client.submit("unheard", model="slow").task_id
    seen = visit()
    seen.expected.append("net::ERR_FAILED")
    seen.page.route("**/api/tasks/*/events", lambda route: route.abort())
    seen.open(fleet.tenant, f"#/{page}{task_id}")
    expect(seen.page.get_by_text("Connection lost, trying again.")).to_be_visible()
    seen.page.unroute_all()
    expect(seen.page.get_by_text("Connection lost, trying again.")).to_be_hidden()
    client.cancel(task_id)
    expect(seen.page.locator(".state").first).to_have_text("canceled")
