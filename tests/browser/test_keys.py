"""API keys on the page Operate: the list as it is by now, and what is done with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import SIZES, Fleet, Visit, asked_for_key
from tests.servers import eventually
from tests.tenants import bearer, new_key, revoke

Operate = Callable[..., Page]
LOOK_MS = 5000  # between looks at the list
SEEN = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
STAY = "key => { localStorage.setItem('zfleet.key', key); sessionStorage.removeItem('zfleet.key'); }"


@pytest.fixture
def operate(visit: Callable[..., Visit], fleet: Fleet) -> Operate:
    """Open the page Operate in a window of this size."""

    def opened(size: str = "desktop", key: str = fleet.admin, **options: object) -> Page:
        seen = visit(size, **options)
        seen.page.clock.install()
        seen.open(key, "#/operate")
        expect(ring(seen.page).get_by_role("row").nth(1)).to_be_visible()
        return seen.page

    return opened


def ring(page: Page) -> Locator:
    return page.get_by_role("region", name="API keys", exact=True)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_key_is_made_shown_once_rotated_and_revoked(operate: Operate, fleet: Fleet, size: str) -> None:
    page = operate(size, permissions=["clipboard-read", "clipboard-write"])
    part = ring(page)
    part.get_by_role("button", name="New key …").click()
    dialog = page.get_by_role("dialog", name="New API key")
    tenant = f"studio-{size}"
    dialog.get_by_label("Tenant").fill(tenant)
    for label, value in {"Rate": "20/m", "Share": "2.5", "Most queued": "50", "Most running": "2"}.items():
        dialog.get_by_label(label).fill(value)
    dialog.get_by_label("Highest priority").select_option("normal")
    dialog.get_by_label("Ends").select_option("in 30 days")
    dialog.get_by_role("button", name="Make the key").click()
    shown = page.get_by_role("dialog", name=f"The new key of {tenant}")
    made = shown.get_by_label("The new key").input_value()
    expect(shown.get_by_label("The new key")).to_be_focused()
    shown.get_by_role("button", name="Copy").click()
    expect(shown).to_contain_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == made
    shown.get_by_role("button", name="I have kept it").click()
    key_id = made.split("_")[1]
    key = fleet.broker.key(key_id)
    assert key is not None and key.expires_at is not None
    assert (key.tenant, key.admin, key.rate, key.max_queued, key.max_running) == (tenant, False, "20/m", 50, 2)
    assert key.priority_max == "normal" and round((key.expires_at - key.created_at) / timedelta(days=1)) == 30
    assert fleet.broker.shares()[tenant] == 2.5
    assert made.split("_")[2] not in page.content()
    row = part.get_by_role("row").filter(has_text=key_id)
    for text in (tenant, "active", "to normal", "20/m", "50", "2.5"):
        expect(row).to_contain_text(text)
    part.get_by_role("button", name=f"Rotate {key_id}").click()
    dialog = page.get_by_role("dialog", name="Rotate a key")
    dialog.get_by_label("The old one still works").select_option("for an hour")
    dialog.get_by_role("button", name="Make the new key").click()
    shown.get_by_role("button", name="I have kept it").click()
    expect(row).to_contain_text("retiring")
    part.get_by_role("button", name=f"Revoke {key_id}").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(part.locator("p.outcome")).to_have_text(f"The key {key_id} is revoked.")
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button")).to_have_count(0)
    expect(page.get_by_role("region", name="Keys", exact=True)).to_be_focused()  # what had it is gone


@pytest.mark.parametrize("size", list(SIZES))
def test_what_is_done_with_a_key_is_in_view_however_long_its_tenants_name_is(
    operate: Operate, fleet: Fleet, size: str
) -> None:
    tenant = f"{size}-".ljust(32, "w")
    key_id = new_key(fleet.broker, tenant).split("_")[1]
    page = operate(size)
    within = page.get_by_role("region", name="Keys", exact=True).bounding_box()
    assert within is not None
    for verb in ("Rotate", "Revoke"):
        box = ring(page).get_by_role("button", name=f"{verb} {key_id}").bounding_box()
        assert box is not None
        assert within["x"] <= box["x"] and box["x"] + box["width"] <= within["x"] + within["width"] + 1
    expect(ring(page).get_by_title(tenant)).to_be_visible()


def test_with_the_first_key_the_bar_says_at_once_who_is_reading(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit(extra_http_headers=bearer(fleet.admin))  # let in without a key of the page's own
    nobody = {"tenant": "default", "admin": True, "key_id": None}
    seen.page.route("**/api/me", lambda route: route.fulfill(json=nobody))
    seen.page.goto(f"{seen.url}/#/operate")
    bar = seen.page.get_by_role("banner")
    expect(bar).to_contain_text("tenant default")
    expect(bar.get_by_role("button", name="Sign out")).to_have_count(0)
    ring(seen.page).get_by_role("button", name="New key …").click()
    dialog = seen.page.get_by_role("dialog", name="New API key")
    dialog.get_by_label("Tenant").fill("firstborn")
    dialog.get_by_role("button", name="Make the key").click()
    seen.page.get_by_role("button", name="I have kept it").click()
    expect(bar).to_contain_text("tenant firstborn")
    expect(bar.get_by_role("button", name="Sign out")).to_be_visible()


def test_what_the_gateway_refuses_is_said_as_it_says_it(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    seen.expected.append("status of 422")
    seen.open(fleet.admin, "#/operate")
    ring(seen.page).get_by_role("button", name="New key …").click()
    dialog = seen.page.get_by_role("dialog", name="New API key")
    dialog.get_by_label("Tenant").fill("acme")
    dialog.get_by_label("Most queued").evaluate("entry => { entry.min = -9; entry.value = -7; }")
    dialog.get_by_role("button", name="Make the key").click()
    expect(dialog.locator("p.outcome")).to_have_text(re.compile("max_queued: must be"))


@pytest.mark.parametrize("size", list(SIZES))
def test_the_list_follows_what_others_do(operate: Operate, fleet: Fleet, size: str) -> None:
    page = operate(size)
    part = ring(page)
    tenant = f"elsewhere-{size}"
    first = new_key(fleet.broker, tenant)
    page.clock.fast_forward(LOOK_MS)
    row = part.get_by_role("row").filter(has_text=first.split("_")[1])
    expect(row).to_contain_text("active")
    row.get_by_role("button", name="Rotate").focus()
    page.evaluate("window.kept = document.activeElement.closest('tr')")
    revoke(fleet.broker, first)
    page.clock.fast_forward(LOOK_MS)
    expect(row).to_contain_text("revoked")
    assert page.evaluate("window.kept.isConnected")
    expect(page.get_by_role("region", name="Keys", exact=True)).to_be_focused()


def test_nobody_looks_behind_a_question_or_while_the_page_is_hidden(operate: Operate, fleet: Fleet) -> None:
    page = operate()
    part, asked = ring(page), []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/keys") else None)
    part.get_by_role("button", name="New key …").click()
    dialog = page.get_by_role("dialog", name="New API key")
    dialog.get_by_label("Tenant").fill("half-writ")
    page.clock.fast_forward(2 * LOOK_MS)
    expect(dialog.get_by_label("Tenant")).to_have_value("half-writ")
    assert asked == []
    page.keyboard.press("Escape")
    page.evaluate(SEEN, True)
    later = new_key(fleet.broker, "unseen").split("_")[1]
    page.clock.fast_forward(2 * LOOK_MS)
    page.evaluate("new Promise((resolve) => setTimeout(resolve))")
    assert asked == []
    page.evaluate(SEEN, False)
    expect(part.get_by_role("row").filter(has_text=later)).to_be_visible()


def test_a_list_that_cannot_be_read_says_that_it_may_be_old(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    seen.expected.append("net::ERR_FAILED")
    seen.page.clock.install()
    seen.open(fleet.admin, "#/operate")
    part = ring(seen.page)
    expect(part.get_by_role("row").nth(1)).to_be_visible()
    seen.page.route("**/api/keys", lambda route: route.abort())
    seen.page.clock.fast_forward(LOOK_MS)
    expect(part.get_by_text("The gateway does not answer. What is shown may be old.")).to_be_visible()
    expect(part.get_by_role("row").nth(1)).to_be_visible()
    seen.page.unroute_all()
    seen.page.clock.fast_forward(LOOK_MS)
    expect(part.get_by_text("What is shown may be old.")).to_be_hidden()


def test_the_key_that_one_is_signed_in_with_is_replaced_again_and_again(operate: Operate, fleet: Fleet) -> None:
    page = operate("phone", new_key(fleet.broker, "themselves", admin=True))
    key = page.evaluate("sessionStorage.getItem('zfleet.key')")
    page.evaluate(STAY, key)
    for _ in range(2):
        ring(page).get_by_role("button", name=f"Rotate {key.split('_')[1]}").click()
        page.get_by_role("dialog").get_by_role("button", name="Make the new key").click()
        shown = page.get_by_role("dialog", name="The new key of themselves")
        key = shown.get_by_label("The new key").input_value()
        shown.get_by_role("button", name="I have kept it").click()
        expect(ring(page).get_by_role("button", name=f"Rotate {key.split('_')[1]}")).to_be_visible()
        assert page.evaluate("localStorage.getItem('zfleet.key')") == key, "kept for as long as the one before"
    ring(page).get_by_role("button", name=f"Revoke {key.split('_')[1]}").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("It is the key that you are signed in with.")
    dialog.get_by_role("button", name="Revoke").click()
    eventually(lambda: asked_for_key(page), within_s=30, every_s=0.2)
