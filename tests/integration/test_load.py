"""The load test's one command, against real fleets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from common.settings import load_settings
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "loadtest" / "run.py")]
TIMEOUT_S = 110


def run(folder: Path, *arguments: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    done = subprocess.run(
        [*COMMAND, "--out", str(folder), *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    summary = folder / "summary.json"
    return done, json.loads(summary.read_text()) if summary.exists() else {}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """One slow worker with a short queue."""
    folder = tmp_path_factory.mktemp("fleet")
    with RedisServer(folder) as redis_server:
        settings = load_settings(
            {
                "redis_url": redis_server.url,
                "data_dir": folder,
                "models": ("simulated",),
                "devices": "cpu",
                "simulated_image_ms": 100.0,
                "queue_cap": 2,
            }
        )
        with WorkerServer(settings, folder / "worker.log"), GatewayServer(settings, folder / "gateway.log") as gateway:
            eventually(lambda: _ready(gateway), within_s=30)
            yield gateway


def test_one_command_loads_a_fleet_and_reports(tmp_path: Path) -> None:
    done, summary = run(
        tmp_path, "--workers", "2", "--users", "6", "--duration", "3", "--warm-up", "0.5", "--image-ms", "100"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = summary["runs"]
    assert figures["failures"] == 0
    assert 0 < figures["of_ideal"] < 1.1
    assert figures["images"] > 15
    assert figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    assert "of ideal" in done.stdout
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "time to image" in report
    stats = (tmp_path / "locust_stats.csv").read_text("utf-8")
    for name in ("IMAGE,time to image", "POST,/api/submit", "GET,/api/status/[id]?wait", "GET,/view/[id]/[k]"):
        assert name in stats


def test_open_arrivals_come_at_their_rate(fleet: GatewayServer, tmp_path: Path) -> None:
    done, summary = run(
        tmp_path, "--target", fleet.url, "--users", "2", "--arrivals", "4", "--duration", "5", "--warm-up", "0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = summary["runs"]
    assert 1 < figures["images_per_s"] < 9  # four on average, by chance
    assert figures["of_ideal"] is None


def test_a_full_queue_is_come_back_to_and_no_failure(fleet: GatewayServer, tmp_path: Path) -> None:
    done, summary = run(tmp_path, "--target", fleet.url, "--users", "8", "--duration", "3", "--warm-up", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary["runs"][0]["later"] > 0
    assert "later: 429 /api/submit" in (tmp_path / "locust_stats.csv").read_text("utf-8")


def test_failures_are_told_and_counted(tmp_path: Path) -> None:
    done, summary = run(tmp_path, "--target", "http://127.0.0.1:9", "--users", "1", "--duration", "1", "--warm-up", "0")
    assert done.returncode == 1
    assert summary["runs"][0]["failures"] > 0
    assert "refused" in done.stdout


def test_interrupted_it_leaves_nothing_behind(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "--workers", "2", "--duration", "60", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started: set[psutil.Process] = set()
    until = time.monotonic() + 60
    while not any("locust" in " ".join(_command(each)) for each in started) and time.monotonic() < until:
        started |= set(psutil.Process(child.pid).children(recursive=True))
        time.sleep(0.1)
    time.sleep(1)  # into the run
    started |= set(psutil.Process(child.pid).children(recursive=True))
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert len(said.strip().splitlines()) == 1
    assert len(started) >= 5  # Redis, gunicorn and its worker, the supervisor and its children, locust
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def _ready(gateway: GatewayServer) -> bool:
    try:
        return requests.get(f"{gateway.url}/ready", timeout=2).ok
    except requests.RequestException:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
