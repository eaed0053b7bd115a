"""Writes the pictures of the dashboard in docs/: `python -m tests.browser.screenshots`.

The page and the gateway are real; the fleet of eight GPUs that they show is made up, as told in states.py.
"""

from __future__ import annotations

import io
import math
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from common.broker import Broker
from common.settings import Settings
from tests.browser.conftest import QUIET, SIZES
from tests.browser.states import Stage, fleet_of, history, run, waits, worker
from tests.servers import GatewayServer, RedisServer, binary
from tests.tenants import new_key

DOCS = Path(__file__).parents[2] / "docs"
SHOTS = (("dashboard-fleet", "desktop", "light", 1100), ("dashboard-phone", "phone", "dark", 844))
MOST_BYTES = 80_000


def main() -> None:
    """Take the pictures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(RedisServer(folder))
        settings = Settings(redis_url=redis.url, data_dir=folder / "data", models=("simulated",))
        broker = Broker(settings)
        key = new_key(broker, "operators", admin=True)
        gateway = stack.enter_context(GatewayServer(settings, folder / "gateway.log"))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=binary("chromium"), args=list(QUIET), chromium_sandbox=False
        )
        for name, size, theme, height in SHOTS:
            path = DOCS / f"{name}.webp"
            path.write_bytes(shoot(browser, gateway.url, key, size=size, theme=theme, height=height))
            assert path.stat().st_size < MOST_BYTES, f"{path.name} is too heavy"
        browser.close()
        broker.close()


def shoot(browser: Browser, url: str, key: str, *, size: str, theme: Any, height: int) -> bytes:
    """Return a picture of the page Fleet as a WebP file."""
    context = browser.new_context(viewport={"width": SIZES[size][0], "height": height}, color_scheme=theme)
    page = context.new_page()
    stage = Stage(page, waves)
    page.goto(url)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Trends").wait_for()
    stage.tell(fleet())
    page.get_by_role("heading", name="node1.gpu0").wait_for()
    page.locator("path.line").first.wait_for()
    picture = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80, method=6)
    return file.getvalue()


def fleet() -> dict[str, Any]:
    """Eight GPUs, of which one is drained and one has not been heard of."""
    now = datetime.now(UTC)
    workers = []
    for index in range(8):
        name = f"node{1 + index // 4}.gpu{index % 4}.{3 * index + 10:x}c07e"
        gpu = worker()["gpu"] | {
            "utilisation_percent": 97 - 3 * index,
            "temperature_c": 58 + index,
            "power_w": 640 - 9 * index,
        }
        runs = [run(1 + (3 * index + 2 * nth) % 8, task_id=f"{index}{nth}f3a9c1" * 4) for nth in range(1 + index % 3)]
        changes: dict[str, Any] = {"host": name.partition(".")[0], "gpu": gpu, "runs": runs, "state": "busy"}
        if index == 5:
            changes |= {"runs": [], "drained": True, "gpu": gpu | {"utilisation_percent": 0, "power_w": 71}}
        if index == 6:
            changes |= {"seen_at": now - timedelta(seconds=13), "runs": []}
        workers.append(worker(name, **changes))
    queues = [
        {"model": "base", "priority": "low", "queued": 9, "running": 2, "oldest_age_seconds": 8.7},
        {"model": "turbo", "priority": "high", "queued": 0, "running": 3, "oldest_age_seconds": None},
        {"model": "turbo", "priority": "normal", "queued": 31, "running": 7, "oldest_age_seconds": 3.9},
    ]
    return fleet_of(*workers, queues=queues)


def waves(window: str) -> dict[str, Any]:
    """A history that goes up and down."""
    found = history(window, gap=range(0))
    for index, point in enumerate(found["points"]):
        wave = 0.75 + 0.2 * math.sin(index / 11) + 0.05 * math.sin(index * 1.7)
        for name, most in {
            "succeeded": 30, "images": 44, "p50_seconds": 2.4, "p95_seconds": 6.6, "queued": 41,
            "oldest_age_seconds": 9, "gpu_utilisation_percent": 97, "gpu_memory_used_mb": 170_000,
        }.items():  # fmt: skip
            point[name] = most * wave
        point["error_ratio"] = max(0.0, 0.02 * math.sin(index / 6) - 0.008)
        point["workers"] = 8 if index < 86 else 7
        point["running"] = 12
        point["joules_per_image"] = 900 - 200 * wave
        point["queues"] = [
            waits("base", "low", round(9 * wave), 9 * wave),
            waits("turbo", "normal", round(41 * wave) - round(9 * wave), 4 * wave),
        ]
        if index % 40 > 28:
            point["queues"].append(waits("turbo", "high", 3, 0.8))
            point["queued"] += 3
    return found


if __name__ == "__main__":
    main()
