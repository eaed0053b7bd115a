from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import SIZES, Fleet, Visit
from tests.browser.test_playground import copied
from tests.fleet import await_final, record, submit_many
from tests.integration.test_webhooks import courier
from tests.receivers import Receiver
from tests.servers import eventually
from zfleet.client import Client

DELIVERIES_MS = 5000  # between looks at what has been delivered
VisitFn = Callable[..., Visit]


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    with Client(fleet.url, api_key=fleet.tenant) as client:
        yield client


@pytest.mark.parametrize("size", list(SIZES))
def test_a_finished_task_shows_its_picture_times_attempts_and_request(
    visit: VisitFn, fleet: Fleet, client: Client, size: str
) -> None:
    prompt = "a 'red' <circle>,\n红色圆形"
    wanted = {"seed": 5, "n": 2, "steps": 3, "width": 96, "height": 48, "negative_prompt": "blue"}
    done = client.generate(prompt, **wanted, metadata={"order": "17"})
    task_id = done.view.task_id
    seen = visit(size, permissions=["clipboard-read", "clipboard-write"])
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    page = seen.page
    expect(page.locator(".state")).to_have_text("succeeded")
    pictures = page.get_by_role("img", name="a 'red' <circle>")
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_have_js_property("naturalWidth", 96)
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
    for text in ("Not: blue", "96 × 48", "metadata order"):
        expect(request).to_contain_text(text)
    expect(page.get_by_role("button", name=re.compile("Cancel|Retry"))).to_have_count(0)
    assert seen.sideways() == 0
    assert r"""-d '{"prompt":"a '\''red'\'' <circle>,\n红色圆形",""" in copied(seen, "curl")
    assert "        steps=3,\n" in copied(seen, "Python")
    page.get_by_role("link", name="Try in playground").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(prompt)
    for label, value in (("Steps", "3"), ("Size", "96x48"), ("Seed", "5"), ("Pictures", "2")):
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_role("link", name="Download")).to_have_count(2)
    expect(page.get_by_text("Also of that task: metadata")).to_be_visible()
    page.get_by_role("button", name="Leave out").click()
    expect(page.get_by_text("Also of that task: metadata")).to_be_hidden()


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
    retries = set()
    for _ in range(2):  # done over twice it is the same retry
        page.get_by_role("button", name="Retry").click()
        page.wait_for_url(re.compile(f"#/tasks/(?!{task_id})"))
        retries.add(page.url.rpartition("/")[2])
        page.get_by_role("link", name=task_id[:8]).click()
        expect(page.get_by_role("heading", level=1)).to_contain_text(task_id)
    assert [client.status(again).retry_of for again in retries] == [task_id]
    seen.expected.append("status of 404")
    seen.open(fleet.tenant, f"#/tasks/{'0' * 32}")
    expect(page.get_by_text("no task has this id")).to_be_visible()
    page.get_by_role("link", name="All tasks").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Tasks")


@pytest.mark.parametrize("size", list(SIZES))
def test_what_a_webhook_was_told_and_what_came_of_it_stands_in_a_table(visit: VisitFn, fleet: Fleet, size: str) -> None:
    with Receiver() as receiver:
        hook = {"url": receiver.url, "events": ["started", "ended"]}
        (task_id,) = submit_many(fleet.broker, 1, tenant="acme", model="simulated", webhook=hook)
        await_final(fleet.broker, [task_id])
        seen = visit(size)
        seen.page.clock.install()
        seen.open(fleet.tenant, f"#/tasks/{task_id}")
        rows = seen.page.get_by_role("region", name="Webhook").get_by_role("row")
        expect(rows).to_contain_text(["Last answer", "startedpending0–", "endedpending0–"])
        receiver.behaviour = lambda one: one.answer(410 if one.headers["webhook-id"].endswith("ended") else 200)
        with courier(fleet.settings.model_copy(update={"webhook_allow": (receiver.netloc,)})):
            eventually(lambda: all(one.state != "pending" for one in record(fleet.broker, task_id).deliveries))
        seen.page.clock.fast_forward(DELIVERIES_MS)
        expect(rows).to_contain_text(["", "starteddelivered1200–", "endedfailed1it is gone, says the receiver–"])
        assert (seen.sideways(), seen.nameless()) == (0, [])


def test_the_cards_of_a_task_without_pictures_begin_on_one_line(visit: VisitFn, fleet: Fleet, client: Client) -> None:
    task_id = client.submit("never", model="slow").task_id
    client.cancel(task_id)
    seen = visit()
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    expect(seen.page.locator(".state")).to_have_text("canceled")
    cards = [seen.page.get_by_role("region", name=name) for name in ("Time", "Request")]
    assert len({box["y"] for card in cards if (box := card.bounding_box())}) == 1


def test_a_task_that_waits_shows_its_place_and_expires(visit: VisitFn, fleet: Fleet, client: Client) -> None:
    before = [client.submit("first", model="slow").task_id for _ in range(4)]
    task_id = client.submit("late", model="slow", deadline_s=2.5).task_id
    seen = visit()
    seen.open(fleet.tenant, f"#/tasks/{task_id}")
    expect(seen.page.get_by_text(re.compile("before it in line|Next in line"))).to_be_visible()
    expect(seen.page.locator(".state")).to_have_text("expired")
    expect(seen.page.get_by_text("The deadline passed before a worker was free.")).to_be_visible()
    for other in before:
        fleet.broker.cancel(other, None)


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
