"""What of the load test needs no locust: where load may go, what is asked for, and the table."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.models import BUILT_IN
from common.schemas import GenerateRequest
from gateway import submission
from loadtest.figures import Figures, save, table
from loadtest.menu import Limits, order
from loadtest.target import NotLoopback, require_loopback

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080", "http://localhost:8080", "https://[::1]:8443", "http://127.8.9.1", "http://LOCALHOST:80"],
)
def test_this_machine_may_be_loaded(url: str) -> None:
    assert require_loopback(url + "/") == url


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com", "http://10.0.0.1:8080", "http://192.168.1.5", "http://127.0.0.1.example.com",
        "http://localhost.example.com", "http://0.0.0.0:8080", "http://[2001:db8::1]:80", "http://2130706433",
        "http://127.0.0.1@example.com", "ftp://localhost", "localhost:8080", "http://", "", "http://127.0.0.1:99999",
        "http://[::1",
    ],
)  # fmt: skip
def test_nothing_else_may(url: str) -> None:
    with pytest.raises(NotLoopback) as caught:
        require_loopback(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["http://example.com", "http://127.0.0.1.example.com:80"])
@pytest.mark.parametrize("path", ["loadtest/run.py", "loadtest/locustfile.py"])
def test_a_target_elsewhere_is_refused_in_one_line(path: str, target: str) -> None:
    command = [sys.executable, str(ROOT / path), "--target", target]
    if path.endswith("locustfile.py"):
        command = [
            sys.executable, "-m", "locust", "-f", str(ROOT / path), "--headless", "--loglevel", "ERROR",
            "--host", target, "--run-time", "1s",
        ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and target in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--users", "0"], ["--users", "100000"], ["--workers", "0"], ["--duration", "nan"], ["--duration", "1e9"],
        ["--image-ms", "-1"], ["--scale", "1,x"], ["--scale", "0"], ["--model", "turbo"], ["--nonsense"],
        ["--scale", "1,2", "--target", "http://127.0.0.1:1"], ["--warm-up", "-1"], ["--arrivals", "-2"],
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "loadtest" / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("model", [spec.name for spec in BUILT_IN])
def test_every_order_is_one_that_the_gateway_takes(model: str) -> None:
    specs = {spec.name: spec for spec in BUILT_IN}
    view = specs[model].model_dump() | {"default": True, "size_multiple": 16}
    limits = Limits.read([view])
    rng = random.Random(7)
    sizes: Counter[tuple[int, int]] = Counter()
    priorities: Counter[str] = Counter()
    prompts = set()
    for _ in range(500):
        body = order(rng, limits)
        request = GenerateRequest.model_validate_json(json.dumps(body))
        resolved = submission.resolve(request, submission.check(request, _Catalogue(specs)))
        assert resolved.model == model
        sizes[resolved.width, resolved.height] += 1
        priorities[resolved.priority] += 1
        prompts.add(resolved.prompt)
    assert len(sizes) >= 3
    assert priorities["normal"] > priorities["high"] > priorities["low"] > 0
    assert len(prompts) > 490


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(LookupError, match=r"'turbo'.*pico"):
        Limits.read([{"name": "pico", "default": True}], "turbo")


def test_figures_of_a_run() -> None:
    one, eight = _figures(1, 3.1), _figures(8, 24.0)
    assert one.of_ideal == pytest.approx(0.992)
    assert eight.of_ideal == pytest.approx(0.96)
    assert eight.of_linear(one) == pytest.approx(24.0 / 24.8)
    lines = table([one, eight]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "0.968" in lines[3]


def test_a_run_without_figures_has_failed(tmp_path: Path) -> None:
    missing = Figures.read(tmp_path / "none.json", workers=2, users=4, image_ms=100)
    assert missing.failures == 1 and "locust.log" in missing.first_failure
    (tmp_path / "empty.json").write_text(json.dumps({"failures": 0, "first_failure": ""}))
    empty = Figures.read(tmp_path / "empty.json", workers=None, users=4, image_ms=None)
    assert empty.failures == 1 and "no picture" in empty.first_failure
    assert empty.of_ideal is None
    save(tmp_path / "summary.json", [empty], target="http://127.0.0.1:1")
    saved: dict[str, Any] = json.loads((tmp_path / "summary.json").read_text())
    assert saved["runs"][0]["of_ideal"] is None
    assert "–" in table([empty])


def _figures(workers: int, per_s: float) -> Figures:
    return Figures(
        workers=workers, users=3 * workers, images=int(per_s * 20), seconds=20.0, images_per_s=per_s,
        ideal_per_s=workers * 3.125, p50_ms=900, p95_ms=1000, p99_ms=1100, later=0, failures=0, first_failure="",
    )  # fmt: skip


class _Catalogue(dict[str, Any]):
    default = None
