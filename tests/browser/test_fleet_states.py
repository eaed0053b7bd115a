"""What the page Fleet shows of states that a fleet rarely is in, told by a stream of the test's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import SIZES, Fleet, Visit
from tests.browser.states import Stage, fleet_of, history, run, waits, worker

Past = Callable[[str], dict[str, Any]]
UNKNOWN = (
    "oldest_age_seconds", "error_ratio", "joules_per_image", "gpu_utilisation_percent", "gpu_memory_used_mb",
)  # fmt: skip
Staged = Callable[..., tuple[Page, Stage]]


@pytest.fixture
def staged(visit: Callable[..., Visit], fleet: Fleet) -> Staged:
    """Open the page Fleet in a window of this size, with a stage."""

    def opened(size: str = "desktop", past: Past | None = None, **options: object) -> tuple[Page, Stage]:
        seen = visit(size, **options)
        stage = Stage(seen.page, past)
        seen.open(fleet.admin, "#/fleet")
        return seen.page, stage

    return opened


def test_the_verdict_says_in_a_line_how_the_fleet_is(staged: Staged) -> None:
    page, stage = staged()
    verdict = page.get_by_role("status", name="Verdict")
    stage.tell(fleet_of(worker()))
    expect(verdict).to_contain_text("Healthy 1 worker, with turbo in memory")
    stage.tell(fleet_of(worker(), suspended=True))
    expect(verdict).to_contain_text("The fleet is paused")
    expect(verdict.get_by_role("strong")).to_have_text("Paused")
    stage.tell(fleet_of(worker(), status="degraded", reasons=("GPUs lost: 1", "the disk is 91% full")))
    expect(verdict.get_by_role("strong")).to_have_text("Degraded")
    expect(verdict.get_by_role("listitem")).to_have_text(["GPUs lost: 1", "the disk is 91% full"])
    stage.tell(fleet_of(worker(), status="unhealthy", reasons=("Redis does not answer",)))
    expect(verdict.get_by_role("strong")).to_have_text("Unhealthy")


def test_crashes_and_tripped_fuses_of_late_stand_in_the_verdict_and_lead_to_the_failed_tasks(staged: Staged) -> None:
    page, stage = staged()
    verdict = page.get_by_role("status", name="Verdict")
    stage.tell(fleet_of(worker()))
    expect(verdict).to_contain_text("Healthy")
    expect(verdict.get_by_role("link")).to_have_count(0)
    recent = fleet_of()["recent"]
    dead: dict[str, Any] = {"status": "degraded", "reasons": ("no worker is alive",)}
    stage.tell(fleet_of(**dead, recent=recent | {"crashes": 4}))
    expect(verdict).to_contain_text("4 crashes of workers in the last 15 min.")
    stage.tell(fleet_of(**dead, recent=recent | {"crashes": 1, "fuses": 2}))
    expect(verdict).to_contain_text("1 crash of a worker and 2 tasks stopped by a limit in the last 15 min.")
    verdict.get_by_role("link", name="Failed tasks").click()
    expect(page.get_by_role("combobox", name="State")).to_have_value("failed")


def test_a_card_tells_what_a_worker_has_and_does(staged: Staged) -> None:
    page, stage = staged()
    stage.tell(fleet_of(worker(state="busy", runs=[run(3), run(0, 0, "1" * 32)])))
    card = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="node.gpu0.abc123"))
    for text in (
        "busy", "NVIDIA H100 80GB HBM3", "87 %", "20.0 GiB of 80.0 GiB", "61 °C", "611 W", "12,873",
        "1 d 6 h", "3.0 GiB", "2 of 4", "turbo", "base", "3 / 8", "begins",
    ):  # fmt: skip
        expect(card).to_contain_text(text)
    expect(card.get_by_role("progressbar", name="Task 0f3a9c1b")).to_have_attribute("value", "3")
    expect(card.get_by_role("link", name="0f3a9c1b")).to_have_attribute("href", "#/tasks/" + "0f3a9c1b" * 4)
    expect(card.get_by_title("base is loaded on first use")).to_be_visible()
    stage.tell(fleet_of(worker(gpu=None, device="cpu", drained=True)))
    expect(card).to_contain_text("drained")
    expect(card.get_by_role("meter")).to_have_count(0)


def test_a_worker_that_falls_silent_stays_and_says_so(staged: Staged) -> None:
    page, stage = staged()
    one, other = worker("node.gpu0.aaaaaa"), worker("node.gpu1.bbbbbb")
    stage.tell(fleet_of(one, worker("node.gpu1.bbbbbb", seen_at=datetime.now(UTC) - timedelta(seconds=14))))
    card = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="node.gpu1.bbbbbb"))
    expect(card).to_contain_text("Not heard of for 14 s")
    verdict = page.get_by_role("status", name="Verdict")
    expect(verdict).to_contain_text("Degraded")
    expect(verdict.get_by_role("listitem")).to_have_text(
        "Not heard of: node.gpu1.bbbbbb; look at the machine, and its log."
    )
    stage.tell(fleet_of(one, other))
    expect(verdict).to_contain_text("Healthy")
    expect(card).not_to_contain_text("Not heard of")
    stage.tell(fleet_of(one))
    expect(card).to_contain_text("silent")
    stage.tell(fleet_of(one, worker("node.gpu1.cccccc", state="loading")))  # who takes its place on that GPU
    expect(card).to_have_count(0)
    expect(page.get_by_role("heading", level=2, name="Workers")).to_have_text("Workers 1 idle, 1 loading")


def test_without_redis_what_is_shown_is_of_before_and_no_worker_is_to_blame(staged: Staged) -> None:
    page, stage = staged()
    before = worker(seen_at=datetime.now(UTC) - timedelta(seconds=9))
    stage.tell(fleet_of(before))
    expect(page.get_by_text("silent", exact=True)).to_be_visible()  # nothing comes, and time passes
    stage.tell(fleet_of(before, status="unhealthy", reasons=("Redis does not answer",)))
    verdict = page.get_by_role("status", name="Verdict")
    expect(verdict.get_by_role("listitem")).to_have_text(
        ["Redis does not answer", re.compile(r"What else is shown is of \d+:\d\d:\d\d")]
    )
    expect(page.get_by_text("silent", exact=True)).to_have_count(0)
    expect(page.locator(".old")).to_have_count(3)
    stage.tell(fleet_of(worker()))
    expect(page.locator(".old")).to_have_count(0)


def test_figures_that_are_too_high_stand_out_and_lead_to_their_tasks(staged: Staged) -> None:
    page, stage = staged()
    queue = {"model": "turbo", "priority": "normal", "queued": 3, "running": 0, "oldest_age_seconds": 301.0}
    stage.tell(fleet_of(worker(), queues=[queue | {"priority": "low", "oldest_age_seconds": 3000.0}]))
    expect(page.get_by_text("50 min 0 s").first).to_be_visible()
    expect(page.locator(".high")).to_have_count(0)
    recent = fleet_of()["recent"]
    stage.tell(fleet_of(worker(), queues=[queue], recent=recent | {"error_ratio": 0.25}))
    expect(page.locator(".high")).to_have_text(["5 min 1 s", "25%"])
    page.get_by_role("link", name="Errors").click()
    expect(page.get_by_role("combobox", name="State")).to_have_value("failed")


def test_news_takes_away_neither_focus_nor_place(staged: Staged) -> None:
    page, stage = staged()
    stage.tell(fleet_of(worker(runs=[run(1)])))
    link = page.get_by_role("link", name="0f3a9c1b")
    link.focus()
    page.evaluate("window.element = document.activeElement")
    top = page.evaluate("window.scrollY")
    stage.tell(fleet_of(worker("node.gpu0.aaaaaa"), worker(runs=[run(5), run(2, 8, "2" * 32)])))
    expect(page.get_by_text("5 / 8")).to_be_visible()
    assert page.evaluate("document.activeElement === window.element && element.isConnected")
    assert page.evaluate("window.scrollY") == top


def test_a_stream_that_breaks_is_said_and_comes_back(staged: Staged) -> None:
    page, stage = staged()
    stage.tell(fleet_of(worker(state="busy", runs=[run(1)])))
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    page.route("**/health", lambda route: route.fulfill(body="<html>"))  # as of a proxy in front
    stage.break_off()
    expect(page.get_by_text("connection lost, trying again")).to_be_visible()
    expect(page.get_by_role("status", name="Verdict")).to_contain_text("The gateway does not answer.")
    expect(page.get_by_text("busy", exact=True)).to_be_visible()  # what was seen last stays, with its age
    expect(page.get_by_text(", 2 s old")).to_be_visible()
    page.unroute("**/health")
    stage.mend()
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(page.get_by_role("status", name="Verdict")).to_contain_text("Healthy")


@pytest.mark.parametrize("size", list(SIZES))
def test_charts_are_read_by_pointer_keys_and_table(staged: Staged, size: str) -> None:
    page, _ = staged(size)
    chart = page.get_by_role("figure").filter(has_text="Time to image")
    plot = chart.get_by_role("img")
    expect(plot).to_have_accessible_name(
        "Time to image, the last 15 minutes: p50: last 2.0 s, lowest 2.0 s, highest 2.0 s; "
        "p95: last 6.0 s, lowest 6.0 s, highest 6.0 s. Arrow keys read single points."
    )
    throughput = page.get_by_role("figure").filter(has_text="Throughput").get_by_role("img")
    expect(throughput).to_have_accessible_name(re.compile("tasks: last 48/min, .* images: last 54/min"))
    assert plot.locator("path.line").count() == 4, "two lines, both broken where nothing is known"
    assert {"0 s", "6 s"} <= set(plot.locator("text").all_text_contents())
    box = plot.bounding_box()
    assert box is not None
    middle = 52 + (box["width"] - 60) * 35 / 90  # in the gap
    (plot.hover if size == "desktop" else plot.tap)(position={"x": middle, "y": 60})
    expect(chart.locator(".legend b")).to_have_text(["–", "–"])
    plot.focus()
    page.keyboard.press("End")
    expect(chart.get_by_role("status")).to_contain_text(": 2.0 s, 6.0 s")
    page.keyboard.press("Tab")
    expect(chart.locator(".legend b")).to_have_text(["2.0 s", "6.0 s"])
    chart.get_by_text("Table", exact=False).first.click()
    expect(chart.get_by_role("row")).to_have_count(91)
    page.get_by_label("7 d").check()
    expect(plot).to_have_accessible_name(re.compile("the last 7 days"))


def chart_of(page: Page, title: str) -> Locator:
    return page.get_by_role("figure", include_hidden=True).filter(has=page.get_by_role("heading", name=title))


def past_of(**changes: object) -> Past:
    """A history whose points, as far as anything is known of them, are like these."""

    def past(window: str) -> dict[str, Any]:
        found = history(window)
        for point in found["points"]:
            if point["queued"] is not None:
                point |= changes
        return found

    return past


@pytest.mark.parametrize("size", list(SIZES))
def test_what_waits_has_a_line_for_each_model_and_priority(staged: Staged, size: str) -> None:
    page, _ = staged(size)
    depth, wait = chart_of(page, "Queue depth"), chart_of(page, "Oldest wait")
    plot = depth.get_by_role("img")
    expect(plot).to_have_accessible_name(
        "Queue depth, the last 15 minutes: queued: last 3, lowest 3, highest 3; running: last 2, lowest 2, highest 2; "
        "turbo high: last 1, lowest 1, highest 1; turbo normal: last 2, lowest 2, highest 2. Arrow keys read single "
        "points."
    )
    expect(wait.get_by_role("img")).to_have_accessible_name(re.compile("of all: last 4.0 s, .*turbo high: last 2.0 s"))
    names = ["queued 3", "running 2", "turbo high 1", "turbo normal 2"]
    expect(depth.locator(".legend")).to_have_text(names)
    expect(wait.locator(".legend")).to_have_text(["of all 4.0 s", "turbo high 2.0 s", "turbo normal 4.0 s"])
    styles = "lines => lines.map(line => [getComputedStyle(line).stroke, getComputedStyle(line).strokeDasharray])"
    drawn = [tuple(style) for style in plot.locator("path.line").evaluate_all(styles)]
    assert drawn[::2] == drawn[1::2] and len({dashes for _, dashes in drawn}) == 3, "four lines, each with a gap"
    assert [tuple(style) for style in depth.locator(".swatch line").evaluate_all(styles)] == drawn[::2]
    plot.focus()
    page.keyboard.press("End")
    expect(depth.get_by_role("status")).to_contain_text(": queued 3, running 2, turbo high 1, turbo normal 2")
    box = plot.bounding_box()
    assert box is not None
    gap = {"x": 52 + (box["width"] - 60) * 35 / 90, "y": 60.0}
    (plot.hover if size == "desktop" else plot.tap)(position=gap)
    expect(depth.locator(".legend b")).to_have_text(["–"] * 4)
    depth.get_by_text("Table", exact=False).first.click()
    expect(depth.get_by_role("columnheader")).to_have_text(["Time", "queued", "running", "turbo high", "turbo normal"])
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0


def test_of_very_many_queues_the_fullest_have_lines_and_the_rest_is_told(staged: Staged) -> None:
    queues = [waits(f"model{nth}", "normal", nth + 1, 1.0) for nth in range(11)]
    page, _ = staged(past=past_of(queues=queues, queued=66))
    depth = chart_of(page, "Queue depth")
    expect(depth.locator(".others .legend")).to_have_text(
        [f"model{nth} normal {nth + 1}" for nth in sorted(range(3, 11), key=str)]
    )
    expect(depth).to_contain_text("3 more in which less waited")
    expect(depth.get_by_role("img")).to_have_accessible_name(re.compile("; 3 more in which less waited"))
    dashes = "lines => new Set(lines.map(line => getComputedStyle(line).strokeDasharray)).size"
    assert depth.locator(".others line").evaluate_all(dashes) == 8, "told apart without their colours"


def test_nothing_that_waits_looks_calm_and_what_is_not_known_is_not_there(staged: Staged) -> None:
    page, _ = staged(past=past_of(queues=[], queued=0, **dict.fromkeys(UNKNOWN)))
    wait = chart_of(page, "Oldest wait")
    expect(wait.get_by_role("img")).to_have_accessible_name(re.compile("minutes: last 0 s, lowest 0 s, highest 0 s"))
    expect(wait.locator(".legend b")).to_have_text(["0 s"])
    expect(wait.locator(".others .legend")).to_have_count(0)
    assert wait.locator("path.line").count() == 2, "a line at nothing, broken where nothing is known"
    for title in ("Energy per image", "GPU memory", "GPU utilisation"):
        expect(chart_of(page, title)).to_be_hidden()
    unknown = chart_of(page, "Error rate").get_by_role("img")
    expect(unknown).to_contain_text("Nothing is known")
    expect(unknown).not_to_contain_text("%")


def test_plots_that_stand_beside_one_another_stand_on_one_line(staged: Staged) -> None:
    page, _ = staged(past=past_of(images=4321, succeeded=3210))  # too long for one line of a legend
    plots = [chart_of(page, title).get_by_role("img") for title in ("Throughput", "Time to image", "Workers")]
    expect(plots[0]).to_have_accessible_name(re.compile("images: last "))
    assert len({box["y"] for plot in plots if (box := plot.bounding_box())}) == 1


@pytest.mark.parametrize(("size", "order"), [("desktop", "Trends Queues Workers"), ("phone", "Queues Workers Trends")])
def test_on_a_phone_workers_come_before_the_charts(staged: Staged, size: str, order: str) -> None:
    page, _ = staged(size)
    expect(page.get_by_role("heading", level=2)).to_contain_text(order.split())


def test_energy_per_image_is_a_chart_where_anybody_tells_of_it(staged: Staged) -> None:
    page, _ = staged()
    plot = chart_of(page, "Energy per image").get_by_role("img")
    expect(plot).to_have_accessible_name(re.compile("last 812 J, lowest 812 J, highest 812 J"))
    assert plot.locator("path.line").count() == 2
