from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import SIZES, Fleet, Visit
from tests.servers import eventually
from tests.tenants import new_key
from zfleet.client import Client

VisitFn = Callable[..., Visit]

UNFRIENDLY = 'It\'s a "red" circle,\n\t$HOME `id` $(id) \\n \\\\ !! %s 红色圆形 🙂'
HEAR = """() => {
  window.told = [];
  const hear = (changes) => changes.forEach(({ target }) => told.push(target.textContent));
  new MutationObserver(hear).observe(document.querySelector(".stage [role=status]"), { childList: true });
}"""  # what a screen reader is told while a task goes on
ROOT = Path(__file__).parents[2]


def ask(page: Page, **given: str) -> None:
    """Fill in fields of the form by their labels; a select takes its option's text."""
    for name, value in given.items():
        control = page.get_by_label(name.replace("_", " "), exact=True)
        if control.evaluate("control => control.tagName") == "SELECT":
            control.select_option(label=value)
        else:
            control.fill(value)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_prompt_becomes_a_picture_with_progress_and_preview(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen = visit(size, reduced_motion="reduce")
    seen.open(fleet.tenant, "#/playground")
    page = seen.page
    ask(page, Prompt="a red circle", Model="simulated", Size="80 × 48", Steps="4", Format="PNG", Priority="high")
    page.evaluate(HEAR)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("img", name="a red circle")).to_have_js_property("naturalWidth", 80)
    expect(page.locator(".stage .state")).to_have_text("succeeded")
    assert 1 <= page.evaluate("told.length") <= 6, "of a few steps only"
    task_id = page.url.partition("task=")[2]
    with Client(fleet.url, api_key=fleet.tenant) as client:
        done = client.status(task_id)
    request = done.request
    assert (request.width, request.steps, request.format, request.priority) == (80, 4, "png", "high")
    page.get_by_role("button", name="Keep seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(request.seed))
    expect(page.get_by_label("Random")).not_to_be_checked()
    past = page.get_by_role("region", name="History").get_by_role("link")
    expect(past).to_have_count(1)
    assert seen.sideways() == 0
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("")
    past.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
    expect(page.get_by_role("img", name="a red circle")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(past).to_have_count(0)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_run_is_watched_and_canceled(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen = visit(size)
    seen.open(fleet.tenant, "#/playground")
    page = seen.page
    ask(page, Prompt="a red circle", Model="slow")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("img", name="Preview of the picture")).to_be_visible()
    expect(page.get_by_text(re.compile("Step [0-9]+ of 40"))).to_be_in_viewport()
    assert seen.nameless() == []
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator(".stage .state")).to_have_text("canceled")
    expect(page.get_by_role("link", name="Details")).to_be_focused()
    expect(page.get_by_role("region", name="History")).to_contain_text("canceled")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Task ")


@pytest.mark.parametrize("size", list(SIZES))
def test_a_submit_whose_answer_was_lost_is_repeated_as_the_same_task(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen, tenant = visit(size), f"repeats-{size}"
    seen.expected.append("net::ERR_FAILED")
    key, made = new_key(fleet.broker, tenant), []

    def lose(route: Route) -> None:
        made.append(route.fetch().json()["task_id"])
        route.abort()

    seen.open(key, "#/playground")
    page = seen.page
    page.route("**/api/submit", lose, times=1)
    ask(page, Prompt="a red circle", Model="simulated")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("The gateway does not answer.")
    page.get_by_role("button", name="Generate").dblclick()
    expect(page.locator(".stage .state")).to_have_text("succeeded")
    assert page.url.endswith(f"task={made[0]}")
    expect(page.get_by_role("region", name="History").get_by_role("link")).to_have_count(1)
    page.get_by_role("button", name="Generate").click()  # what has been answered is over: this is another
    expect(page.get_by_role("region", name="History").get_by_role("link")).to_have_count(2)
    page.wait_for_url(re.compile(f"task=(?!{made[0]})"))
    with Client(fleet.url, api_key=key) as client:
        assert {task.task_id for task in client.tasks().tasks} == {made[0], page.url.partition("task=")[2]}


def test_what_is_wrong_stands_at_its_field(visit: VisitFn, fleet: Fleet) -> None:
    seen = visit()
    seen.expected.append("status of 422")
    seen.open(fleet.tenant, "#/playground")
    page = seen.page
    ask(page, Size="Other …", Width="70", Steps="0", Pictures="99")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    wrong = {"Prompt": "is required", "Width": "multiple of 16", "Steps": "from 1 to", "Pictures": "from 1 to"}
    for label, words in wrong.items():
        expect(page.get_by_label(label, exact=True)).to_have_accessible_description(re.compile(words))
        expect(page.get_by_label(label, exact=True)).to_have_attribute("aria-invalid", "true")
    ask(page, Prompt="a red circle", Width="64", Height="64", Steps="4", Pictures="1")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    # what only the gateway knows
    page.route("**/api/submit", lambda route: route.continue_(post_data='{"prompt": "a", "steps": 0, "loras": 1}'))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Steps", exact=True)).to_have_accessible_description(re.compile("must be"))
    expect(page.get_by_role("alert")).to_contain_text("loras: must be an array")


def test_a_key_is_offered_the_priorities_that_it_may_use(visit: VisitFn, fleet: Fleet) -> None:
    seen = visit()
    seen.open(new_key(fleet.broker, "modest", priority_max="low"), "#/playground")
    expect(seen.page.get_by_label("Priority").get_by_role("option")).to_have_text(["low"])
    ask(seen.page, Prompt="a red circle", Model="simulated")
    seen.page.get_by_role("button", name="Generate").click()
    expect(seen.page.get_by_role("link", name="Download")).to_be_visible()


def copied(seen: Visit, what: str) -> str:
    seen.page.get_by_role("button", name=f"Copy as {what}").click()
    expect(seen.page.get_by_text(f"Copied as {what}.")).to_be_visible()
    return str(seen.page.evaluate("navigator.clipboard.readText()"))


def test_what_is_copied_runs_as_it_stands(visit: VisitFn, fleet: Fleet, tmp_path: Path) -> None:
    seen = visit(permissions=["clipboard-read", "clipboard-write"])
    seen.open(fleet.tenant, "#/playground")
    ask(seen.page, Prompt=UNFRIENDLY, Negative_prompt="it's 'blue'", Model="simulated")
    seen.page.get_by_label("Random").uncheck()
    ask(seen.page, Seed="42")
    texts = [copied(seen, "curl"), copied(seen, "Python")]
    assert not any(fleet.tenant in text for text in texts)
    env = os.environ | {"ZFLEET_API_KEY": fleet.tenant, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    for command in (["bash", "-c", texts[0]], [sys.executable, "-c", texts[1]]):
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert run.returncode == 0, run.stderr
        found = re.search("[0-9a-f]{32}", run.stdout)
        assert found, run.stdout
        with Client(fleet.url, api_key=fleet.tenant) as client:
            request = client.wait(found[0], 30).request
        assert (request.prompt, request.negative_prompt, request.seed) == (UNFRIENDLY, "it's 'blue'", 42)
    assert [path.suffix for path in tmp_path.iterdir()] == [".webp"]


@pytest.mark.parametrize("size", list(SIZES))
def test_without_a_clipboard_the_text_is_there_to_be_taken(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen = visit(size)
    seen.page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    seen.open(fleet.tenant, "#/playground")
    ask(seen.page, Prompt="a red circle")
    seen.page.get_by_role("button", name="Copy as curl").click()
    expect(seen.page.get_by_label("The request as curl")).to_have_value(re.compile("^curl .*a red circle", re.DOTALL))
    seen.page.get_by_role("button", name="Close").click()
    expect(seen.page.get_by_role("button", name="Copy as curl")).to_be_focused()


@pytest.mark.parametrize("size", list(SIZES))
def test_a_template_is_filled_in_and_what_is_copied_names_it(visit: VisitFn, fleet: Fleet, size: str) -> None:
    seen = visit(size, permissions=["clipboard-read", "clipboard-write"])
    seen.open(fleet.tenant, "#/playground")
    page = seen.page
    ask(page, Template="E-commerce poster · 电商海报")
    expect(page.get_by_label("Prompt", exact=True)).to_be_hidden()
    expect(page.get_by_label("Size", exact=True)).to_have_value("1024x1536")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Product · 商品")).to_have_accessible_description("is required")
    page.get_by_label("Product · 商品").fill('一罐"龙井茶"')
    texts = [copied(seen, "curl"), copied(seen, "Python")]
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    with Client(fleet.url, api_key=fleet.tenant) as client:
        request = client.status(page.url.partition("task=")[2]).request
    assert (request.template, request.height) == ("poster", 1536)
    assert '一罐"龙井茶"' in request.prompt
    assert '"template":"poster"' in texts[0] and 'template="poster"' in texts[1]
    assert seen.sideways() == 0
    page.reload()
    expect(page.get_by_label("Product · 商品")).to_have_value('一罐"龙井茶"')


def test_a_task_that_cannot_be_asked_about_is_not_gone(visit: VisitFn, fleet: Fleet) -> None:
    seen, asked = visit(), []
    entry = [{"task_id": "0" * 32, "request": {"prompt": "kept"}, "at": "2026-11-26T00:00:00Z", "status": "queued"}]
    kept = f"localStorage.setItem('zfleet.history.acme', {json.dumps(json.dumps(entry))})"
    seen.page.add_init_script(kept)

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=401, json={"title": "no"})

    seen.page.route("**/api/status/*", refuse)
    seen.open(fleet.tenant, "#/playground")
    eventually(lambda: seen.page.wait_for_timeout(20) or asked)
    expect(seen.page.get_by_role("region", name="History")).to_contain_text("queued")
    expect(seen.page.get_by_role("region", name="History")).not_to_contain_text("gone")
