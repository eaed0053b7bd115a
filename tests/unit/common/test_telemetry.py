from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from common import telemetry
from common.settings import load_settings

ROOT = Path(__file__).parents[3]
LOG_TWICE = """
import sys, logging
from pathlib import Path
from common.settings import load_settings
from common import telemetry
telemetry.configure(load_settings({"log_dir": Path(sys.argv[1])}), "test", worker="w1")
telemetry.get_logger().info("happened", task_id="t1", request_id="r1", model="pico", duration_ms=1.5, prompt="a secret")
logging.getLogger("some.library").warning("told %s", "plainly")
print("ready", flush=True)
sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", LOG_TWICE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_lines_are_json_with_what_they_are_about_and_without_prompts(tmp_path: Path) -> None:
    start(tmp_path).communicate("")
    text = (tmp_path / "test-0.log").read_text("utf-8")
    assert "secret" not in text
    first, second = (json.loads(line) for line in text.splitlines())
    assert first["event"] == "happened"
    assert {first["task_id"], first["request_id"], first["model"]} == {"t1", "r1", "pico"}
    assert (first["duration_ms"], first["worker"], first["role"]) == (1.5, "w1", "test")
    assert (second["event"], second["level"]) == ("told plainly", "warning")


def test_no_two_processes_write_one_file(tmp_path: Path) -> None:
    children = [start(tmp_path) for _ in range(3)]
    for child in children:
        child.communicate("")
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["test-0.log", "test-1.log", "test-2.log"]
    start(tmp_path).communicate("")
    assert len(list(tmp_path.glob("*.log"))) == 3


def test_without_a_folder_logs_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        telemetry.configure(load_settings(), "test")
        telemetry.get_logger().info("seen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert json.loads(capsys.readouterr().err)["event"] == "seen"


def test_lines_within_a_block_are_about_the_same_task(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        telemetry.configure(load_settings(), "test")
        with telemetry.lines_about(task_id="t1", request_id="r1"):
            telemetry.get_logger().info("mine")
            logging.getLogger("some.library").warning("mine too")
        telemetry.get_logger().info("nobody's")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line.get("task_id"), line.get("request_id")) for line in lines] == [("t1", "r1")] * 2 + [(None, None)]


CALLS = [
    (path.relative_to(ROOT).as_posix(), call)
    for package in ("common", "gateway", "worker", "zfleet")
    for path in sorted((ROOT / package).rglob("*.py"))
    for call in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(call, ast.Call)
    and isinstance(call.func, ast.Attribute)
    and call.func.attr in ("debug", "info", "warning", "error", "critical")
    and any(keyword.arg == "task_id" for keyword in call.keywords)
]


def test_whoever_logs_a_task_names_its_request_too() -> None:
    for module, call in CALLS:
        assert any(keyword.arg == "request_id" for keyword in call.keywords), f"{module}:{call.lineno}"


def test_a_librarys_warning_is_a_line_of_the_log() -> None:
    program = "import warnings; from common.settings import load_settings; from common.telemetry import configure; "
    program += "configure(load_settings(), 'test'); warnings.warn('two\\nlines')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert "two\nlines" in json.loads(line)["event"]
