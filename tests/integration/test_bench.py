"""The bench in its short form: it measures every row. How good the figures are is for a quiet machine to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240

MEASURES = (
    "Redis commands a task, as clients send them",
    "… more of them for a tenant",
    "gateway CPU a task",
    "… worker bookkeeping",
    "share of ideal throughput",
    "idle pick-up, submit to first step, p50",
    "status wait answered after finish, p50",
    "submits through gunicorn, as a ratio to a bare Flask view",
)


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_the_short_form_measures_every_row(tmp_path: Path) -> None:
    out = tmp_path / "spine.json"
    command = [sys.executable, str(ROOT / "bench" / "spine.py"), "--quick", "--out", str(out)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr

    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    rows = {row["measure"]: row for row in found["rows"] if row["goal"] is not None}
    assert set(rows) == set(MEASURES)
    for row in found["rows"]:
        assert row["value"] > 0, row
        assert row["measure"] in done.stdout
    assert found["cores"] and found["packages"]["rq"] and found["date"]

    # no matter how noisy the machine: these are counted, not timed
    assert rows["Redis commands a task, as clients send them"]["value"] <= 14
    assert rows["… more of them for a tenant"]["value"] <= 2
    assert "submit +0.00, claim +0.00" in rows["… more of them for a tenant"]["note"]
    stock = next(row for row in found["rows"] if row["measure"] == "… stock RQ, as clients send them")
    assert stock["value"] > rows["Redis commands a task, as clients send them"]["value"]


def test_a_mistake_on_the_command_line_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "spine.py"), "--quik"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "--quik" in done.stderr


def measured(bench: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Run a bench's short form; return what it wrote, and what it printed."""
    out = folder / f"{bench}.json"
    command = [sys.executable, "-m", f"bench.{bench}", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout


def test_the_crowd_in_its_short_form_measures_every_row(tmp_path: Path) -> None:
    found, said = measured("listeners", tmp_path)
    assert [row["measure"] for row in found["rows"] if row["measure"].endswith("polls a second")]
    for row in found["rows"]:
        assert row["value"] > 0 and row["measure"] in said, row
    for scene, seen in found["seen"].items():
        assert seen["polls 200"] > 0, scene
        assert bool(seen.get("polls 304")) == ("with If-None-Match" in scene)
    assert any(seen.get("events") for seen in found["seen"].values())


def test_the_viewers_in_their_short_form_measure_every_row(tmp_path: Path) -> None:
    found, said = measured("viewers", tmp_path)
    unseen, watched, cost = found["rows"]
    assert unseen["value"] > 0 and watched["value"] > 0
    assert watched["measure"].endswith("3 look at the dashboard") and watched["note"].endswith("4 workers")
    assert cost["goal"] == 0.05 and cost["value"] == pytest.approx(watched["value"] - unseen["value"], abs=0.001)
    assert all(row["measure"] in said for row in found["rows"])
