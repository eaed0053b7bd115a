"""What all pages have in common: themes, contrast, keyboard, weight."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests.browser.conftest import SIZES, Fleet, Visit

WEB = Path(__file__).parents[2] / "gateway" / "web"
MOST_BYTES = 200_000
AGAIN_MS = 2000  # after which a page asks again
INKS = ("ink", "faint", "accent", "good", "warn", "bad", "second", "third")


def tokens() -> dict[str, tuple[str, str]]:
    """The colours of app.css, light and dark."""
    found = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", (WEB / "app.css").read_text())
    return {name: (light, dark) for name, light, dark in found}


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_can_be_told_from_what_is_behind_them(theme: int) -> None:
    colours = {name: pair[theme] for name, pair in tokens().items()}
    pairs = [(ink, ground) for ink in INKS for ground in ("paper", "card")] + [("on-accent", "accent")]
    assert {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs if
            contrast(colours[pair[0]], colours[pair[1]]) < 4.5} == {}  # fmt: skip
    assert contrast(colours["accent"], colours["track"]) >= 3, "bars, as WCAG 2.1 wants it of graphics"


def test_pages_have_no_colours_but_the_tokens() -> None:
    sheets = [path for path in WEB.rglob("*.css") if path.name != "app.css"]
    assert [path.name for path in sheets if re.search(r"#[0-9a-f]{3,8}\b|rgb|hsl", path.read_text())] == []


def styled(sheet: Path) -> set[str]:
    """The classes that begin a selector of a sheet, whatever element and page they are on."""
    selectors = re.sub(r"/\*.*?\*/|{[^{}]*}", "{}", sheet.read_text(), flags=re.DOTALL)
    return set(re.findall(r"(?:^|[{},])\s*\.([a-z][a-z-]*)", selectors))


def test_what_one_pages_sheet_styles_no_other_does() -> None:
    assert styled(WEB / "css" / "fleet.css") & styled(WEB / "css" / "tasks.css") == set()


def test_every_class_that_is_styled_is_used() -> None:
    scripts = "".join(path.read_text() for path in [*WEB.rglob("*.js"), WEB / "index.html"])
    parts = set(re.findall(r"[a-z]+-(?=\$)|[a-z][a-z-]*[a-z]", scripts))  # `bar-${kind}` is as good as all of bar-
    sheets = {name for sheet in WEB.rglob("*.css") for name in styled(sheet)}
    assert {name for name in sheets if name not in parts and name.partition("-")[0] + "-" not in parts} == set()


@pytest.mark.parametrize("size", list(SIZES))
def test_a_theme_is_chosen_and_kept(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    seen = visit(size, color_scheme="light")
    seen.open(fleet.tenant)
    background = "getComputedStyle(document.body).backgroundColor"
    light = seen.page.evaluate(background)
    button = seen.page.get_by_role("button", name="Theme: auto")
    button.press("Enter")
    seen.page.get_by_role("button", name="Theme: light").press("Enter")
    expect(seen.page.get_by_role("button", name="Theme: dark")).to_be_focused()
    assert seen.page.evaluate(background) != light
    seen.page.reload()
    expect(seen.page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert seen.page.evaluate(background) != light


@pytest.mark.parametrize("size", list(SIZES))
def test_the_keyboard_comes_first_to_the_content(visit: Callable[..., Visit], fleet: Fleet, size: str) -> None:
    seen = visit(size, reduced_motion="reduce")
    seen.open(fleet.admin)
    seen.page.keyboard.press("Tab")
    expect(seen.page.get_by_role("link", name="Skip to content")).to_be_focused()
    assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    seen.page.keyboard.press("Enter")
    expect(seen.page.get_by_role("main")).to_be_focused()
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("Fleet")
    assert seen.page.evaluate("document.documentElement.lang") == "en"


def test_all_pages_together_weigh_little(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen, sizes = visit(), {}
    seen.page.on(
        "response", lambda answer: sizes.update({answer.url: len(answer.body())}) if "/web/" in answer.url else None
    )
    seen.open(fleet.admin)
    for name in ("Fleet", "Tasks", "Playground", "Operate"):
        seen.go(name)
    assert len(sizes) > 10
    assert sum(sizes.values()) < MOST_BYTES


def failing(visit: Visit, times: int) -> list[str]:
    """Have the gateway be away for the next calls of the API; returns those it was away for."""
    missed: list[str] = []

    def answer(route: Route) -> None:
        if len(missed) >= times:
            return route.fallback()
        missed.append(route.request.url)
        return route.abort()

    visit.expected.append("net::ERR_FAILED")
    visit.page.route("**/api/**", answer)
    return missed


def stop_clock(visit: Visit) -> None:
    """Have time on the page stand still until a test has it go on: what is said for two seconds can be looked for."""
    now = time.time()
    visit.page.clock.install(time=now)
    visit.page.clock.pause_at(now + 1)


@pytest.mark.parametrize("address", ["#/tasks", "#/playground", "#/operate", "#/fleet"])
def test_a_page_that_is_opened_while_the_gateway_is_away_comes_by_itself(
    visit: Callable[..., Visit], fleet: Fleet, address: str
) -> None:
    seen = visit()
    missed = failing(seen, times=1)
    stop_clock(seen)
    seen.open(fleet.admin, address)
    expect(seen.page.get_by_text("The gateway does not answer. This page goes on by itself")).to_be_visible()
    expect(seen.page.get_by_label("API key")).to_be_hidden()
    seen.page.clock.fast_forward(AGAIN_MS)
    expect(seen.page.get_by_role("heading", level=1, name=address[2:], exact=False)).to_be_visible()
    assert [url.rpartition("/")[2] for url in missed] == ["me"]
    expect(seen.page.get_by_role("navigation").get_by_role("link", name=address[2:])).to_have_attribute(
        "aria-current", "page"
    )


def test_a_page_that_loses_the_gateway_as_it_begins_begins_anew(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    stop_clock(seen)
    seen.open(fleet.tenant, "#/tasks")
    failing(seen, times=2)
    seen.go("Playground")
    expect(seen.page.get_by_text("This page goes on by itself")).to_be_visible()
    seen.page.clock.fast_forward(AGAIN_MS)
    expect(seen.page.get_by_role("button", name="Generate")).to_be_visible()


def test_an_address_that_names_nothing_shows_the_first_page(visit: Callable[..., Visit], fleet: Fleet) -> None:
    seen = visit()
    seen.open(fleet.tenant, "#/%E0%A4%A/%")
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("Tasks")
