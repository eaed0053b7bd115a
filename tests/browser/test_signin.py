from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import SIZES, Fleet, Visit


@pytest.mark.parametrize("size", list(SIZES))
def test_an_admin_signs_in_and_sees_every_page(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    seen = visit(size)
    seen.page.goto(seen.url)
    seen.page.get_by_label("API key").fill("zfk_000000000000_" + "0" * 64)
    seen.page.get_by_role("button", name="Sign in").click()
    expect(seen.page.get_by_role("alert")).to_have_text("This key opens nothing here.")
    seen.sign_in(fleet.admin)
    for name in ("Fleet", "Tasks", "Playground", "Operate"):
        seen.go(name)
        expect(seen.page.get_by_role("heading", level=1)).to_have_text(name)
    seen.page.get_by_role("button", name="Sign out").click()
    expect(seen.page.get_by_label("API key")).to_be_visible()


def test_a_tenant_sees_its_own_pages_alone(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    seen.sign_in(fleet.tenant)
    expect(seen.page.get_by_role("navigation").get_by_role("link")).to_have_text(["Tasks", "Playground"])


@pytest.mark.parametrize("size", list(SIZES))
def test_who_stays_signed_in_is_so_in_other_tabs_until_signing_out(
    visit: Callable[..., Visit], fleet: Fleet, size: str
) -> None:
    seen = visit(size)
    seen.page.goto(seen.url)
    seen.page.get_by_label("Stay signed in").check()
    seen.page.get_by_label("API key").fill(fleet.tenant)
    seen.page.get_by_label("API key").press("Enter")
    expect(seen.page.get_by_role("button", name="Sign out")).to_be_visible()
    other = seen.page.context.new_page()
    other.goto(f"{seen.url}/#/playground")
    expect(other.get_by_role("heading", level=1)).to_have_text("Playground")
    other.get_by_role("link", name="zfleet").click()
    expect(other.get_by_role("heading", level=1)).to_have_text("Tasks")
    other.get_by_role("button", name="Sign out").click()
    expect(other.get_by_label("API key")).to_be_visible()
    seen.page.reload()
    expect(seen.page.get_by_label("API key")).to_be_visible()
