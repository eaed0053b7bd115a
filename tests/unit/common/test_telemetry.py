from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from common import telemetry
from common.errors import ConfigurationError
from common.settings import load_settings

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


def test_files_rotate_at_a_hundred_megabytes_and_seven_are_kept(tmp_path: Path) -> None:
    handler = telemetry._handler(tmp_path, "rotating")
    assert isinstance(handler, logging.handlers.RotatingFileHandler)
    assert (handler.maxBytes, handler.backupCount) == (100 * 1024 * 1024, 7)
    handler.close()


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


def test_a_folder_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ConfigurationError, match="ZFLEET_LOG_DIR"):
        telemetry._handler(in_the_way / "logs", "test")


def test_a_librarys_warning_is_a_line_of_the_log() -> None:
    program = "import warnings; from common.settings import load_settings; from common.telemetry import configure; "
    program += "configure(load_settings(), 'test'); warnings.warn('two\\nlines')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert "two\nlines" in json.loads(line)["event"]
