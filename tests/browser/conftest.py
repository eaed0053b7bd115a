"""A fleet with simulated workers, and pages of it in a real Chromium.

A page fails its test for anything that the browser logs as an error, and for any request that leaves this machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from common.broker import Broker
from common.settings import Settings
from tests.fleet import ready_workers
from tests.servers import GatewayServer, RedisServer, WorkerServer, binary, eventually
from tests.tenants import new_key
from zfleet.client import Client

PATIENCE_S = 30  # with a page of which something is expected, on a busy machine
START_S = 120  # a browser's first page waits for the browser
TEST_S = 300  # the first test waits for fleet and browser, too
LONG_MS = 12_000  # no page looks less often
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
QUIET = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
USABLE = "button|checkbox|combobox|link|progressbar|searchbox|spinbutton|textbox"
MISSING_KEY = "status of 401"  # how a page learns that it has to ask for a key
MODELS = """
[slow]
source = "builtin"
pipeline = "simulated"
width = 64
height = 64
min_side = 16
steps = 40
max_batch = 1
options = { image_ms = 20000, faults = true }
"""  # time enough to look at a task that runs; and it fails for prompts that say so


expect.set_options(timeout=PATIENCE_S * 1000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TEST_S))


@dataclass
class Fleet:
    """Where it is, how to look behind it, and keys for it."""

    url: str
    broker: Broker
    settings: Settings
    admin: str
    tenant: str


@dataclass
class Visit:
    """One browser window at the dashboard, and what went wrong in it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # parts of messages that are no failure in this test

    def open(self, key: str, address: str = "") -> None:
        """Open a page of the dashboard as whoever has signed in before."""
        self.page.add_init_script(f"sessionStorage.setItem('zfleet.key', {key!r})")
        self.page.goto(f"{self.url}/{address}")
        self.page.get_by_role("heading", level=1).wait_for()

    def nameless(self) -> list[str]:
        """Return what can be used on the page but tells a screen reader no name."""
        lines = self.page.locator("body").aria_snapshot().splitlines()
        return [line for line in lines if re.match(rf"\s*- ({USABLE})(?! \")", line)]

    def sideways(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def sign_in(self, key: str) -> None:
        """Open the dashboard and sign in."""
        self.page.goto(self.url)
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("navigation").get_by_role("link").first.wait_for()

    def go(self, name: str) -> None:
        """Open a page by its link in the menu."""
        self.page.get_by_role("navigation").get_by_role("link", name=name).click()
        self.page.get_by_role("heading", level=1).wait_for()


def asked_for_key(page: Page) -> bool:
    """Whether a page whose clock is installed asks for a key by now; until it does, its clock goes on a good deal."""
    page.clock.fast_forward(LONG_MS)
    return page.get_by_label("API key").is_visible()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway and two simulated workers over a Redis, with an admin's key and a tenant's."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "models.toml").write_text(MODELS)
    with RedisServer(folder) as redis:
        settings = Settings(
            redis_url=redis.url, data_dir=folder / "data", models=("simulated", "slow"), devices="cpu",
            models_file=folder / "models.toml", workers_per_device=2, simulated_image_ms=300.0, beat_s=0.5,
        )  # fmt: skip
        broker = Broker(settings)
        admin, tenant = new_key(broker, "operators", admin=True), new_key(broker, "acme")
        worker = WorkerServer(settings, folder / "worker.log")
        with worker, GatewayServer(settings, folder / "gateway.log") as gateway:
            ready_workers(broker, 2)
            eventually(lambda: Client(gateway.url).ready() is None, within_s=30)
            yield Fleet(gateway.url, broker, settings, admin, tenant)
        broker.close()


@pytest.fixture(scope="session")
def browser(fleet: Fleet) -> Iterator[Browser]:
    """The Chromium of this machine, headless, which has shown a page already."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=binary("chromium"), args=list(QUIET), chromium_sandbox=False, timeout=START_S * 1000
        )
        with running.new_page() as page:
            page.goto(fleet.url, timeout=START_S * 1000)
            page.get_by_role("heading", level=1).wait_for(timeout=START_S * 1000)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser, fleet: Fleet) -> Iterator[Callable[..., Visit]]:
    """Open windows of a size of SIZES; at the end nothing may have gone wrong in any of them."""
    visits: list[Visit] = []

    def open_window(size: str = "desktop", **options: Any) -> Visit:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, is_mobile=size == "phone", has_touch=size == "phone", **options
        )
        visits.append(Visit(context.new_page(), fleet.url))
        _watch(visits[-1])
        return visits[-1]

    yield open_window
    for one in visits:
        one.page.context.close()
        assert [error for error in one.errors if not any(part in error for part in one.expected)] == []


def _watch(visit: Visit) -> None:
    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and MISSING_KEY not in message.text:
            visit.errors.append(f"{message.text} ({message.location.get('url')})")

    def asked(request: Request) -> None:
        if request.url.split(":")[0] not in ("data", "blob") and urlsplit(request.url).hostname != "127.0.0.1":
            visit.errors.append(f"a request left this machine: {request.url}")

    visit.page.on("console", heard)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("request", asked)
