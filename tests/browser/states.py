"""States of a fleet that a test fleet does not get into at will, and a stream that tells them to a page.

The stream stands in for GET /api/fleet/events within the page, so that a test says what comes and when it breaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from playwright.sync_api import Page, Route

STREAM = """
const answer = window.fetch;
let stream = null, last = null, away = false;
window.fetch = (path, options) => {
  if (String(path) !== "api/fleet/events") return answer(path, options);
  if (away) return Promise.reject(new TypeError("away"));
  const body = new ReadableStream({ start: (controller) => { stream = controller; } });
  if (last) stream.enqueue(last);
  return Promise.resolve(new Response(body));
};
window.tellFleet = (text) => {
  last = new TextEncoder().encode(`event: fleet\\ndata: ${text}\\n\\n`);
  stream?.enqueue(last);
};
window.breakStream = () => { away = true; stream.error(new TypeError("away")); };
window.mendStream = () => { away = false; };
"""
WINDOWS_S = {"15m": 900, "6h": 6 * 3600, "7d": 7 * 86_400}
POINTS = 90


class Stage:
    """A page whose fleet is what the test says."""

    def __init__(self, page: Page, past: Callable[[str], dict[str, Any]] | None = None) -> None:
        """`past` makes the history of a window; `history` unless given."""
        self._page = page
        self._past = past or history
        page.add_init_script(STREAM)
        page.route("**/api/history?window=*", self._history)

    def tell(self, fleet: dict[str, Any]) -> None:
        """Have the stream tell this state."""
        self._page.evaluate("text => window.tellFleet(text)", json.dumps(fleet, default=str))

    def break_off(self) -> None:
        self._page.evaluate("window.breakStream()")

    def mend(self) -> None:
        self._page.evaluate("window.mendStream()")

    def _history(self, route: Route) -> None:
        route.fulfill(json=self._past(route.request.url.partition("window=")[2]))


def worker(name: str = "node.gpu0.abc123", **changes: Any) -> dict[str, Any]:
    """A worker as GET /api/fleet has it."""
    now = datetime.now(UTC)
    gpu = {
        "name": "NVIDIA H100 80GB HBM3", "index": 0, "memory_used_mb": 20_480, "memory_total_mb": 81_920,
        "utilisation_percent": 87, "temperature_c": 61, "power_w": 611.3,
    }  # fmt: skip
    card: dict[str, Any] = {
        "name": name, "host": "node", "pid": 7, "state": "idle", "device": "cuda:0", "gpu": gpu, "capacity": 4,
        "models": ["turbo", "base"], "models_loaded": ["turbo"], "max_pixels": {}, "loras": [], "counters": {},
        "running": [], "runs": [], "images_done": 12_873, "rss_mb": 3120, "started_at": now - timedelta(hours=30),
        "seen_at": now, "drained": False,
    }  # fmt: skip
    return card | changes


def run(step: int, steps: int = 8, task_id: str = "0f3a9c1b" * 4) -> dict[str, Any]:
    """A task that a worker holds, as GET /api/fleet has it."""
    started = datetime.now(UTC)
    return {"task_id": task_id, "tenant": "acme", "model": "turbo", "step": step, "steps": steps, "started_at": started}


def fleet_of(
    *workers: dict[str, Any], status: str = "healthy", reasons: tuple[str, ...] = (), **changes: Any
) -> dict[str, Any]:
    """A state of the fleet as GET /api/fleet has it."""
    health = {
        "status": status, "reasons": reasons, "uptime_seconds": 1.0, "gpu_memory_used_mb": 1, "pending_tasks": 0,
        "models_loaded": ["turbo"], "workers": len(workers),
    }  # fmt: skip
    recent = {
        "window_seconds": 900, "tasks_per_minute": 41.2, "images_per_minute": 63.8, "error_ratio": 0.012,
        "p50_seconds": 2.31, "p95_seconds": 6.9, "crashes": 0, "fuses": 0,
    }  # fmt: skip
    state = {
        "at": datetime.now(UTC), "health": health, "suspended": False, "queues": [], "workers": workers,
        "recent": recent,
    }  # fmt: skip
    return state | changes


def history(window: str, gap: range = range(30, 40)) -> dict[str, Any]:
    """A history as GET /api/history has it: p50 of 2 s, p95 of 6, ten points of which nothing is known."""
    step, now = WINDOWS_S[window] / POINTS, datetime.now(UTC)
    known = {
        "submitted": 6, "succeeded": 6, "failed": 1, "canceled": 1, "expired": 0, "images": 9, "crashes": 0,
        "fuses": 0, "error_ratio": 0.0,
        "p50_seconds": 2.0, "p95_seconds": 6.0, "queued": 3, "running": 2, "oldest_age_seconds": 4.0, "workers": 4,
        "gpu_utilisation_percent": 50.0, "gpu_memory_used_mb": 20_480, "joules_per_image": 812.0,
        "queues": [waits("turbo", "high", 1, 2.0), waits("turbo", "normal", 2, 4.0)],
    }  # fmt: skip
    points = [
        {"at": (now - timedelta(seconds=step * (POINTS - 1 - index))).isoformat()}
        | (dict.fromkeys(known) if index in gap else known)
        for index in range(POINTS)
    ]
    return {"window": window, "step_seconds": step, "points": points}


def waits(model: str, priority: str, queued: int, oldest_age_seconds: float) -> dict[str, Any]:
    """What waited of a model at one priority, as a point of GET /api/history has it."""
    return {"model": model, "priority": priority, "queued": queued, "oldest_age_seconds": oldest_age_seconds}
