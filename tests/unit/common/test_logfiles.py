from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import logfiles
from common.errors import ConfigurationError
from common.logfiles import LogFile, open_log

LINES = 2000
WRITES = """
import logging, sys
from pathlib import Path
from common import logfiles, telemetry
from common.settings import load_settings
logfiles.ROTATE_BYTES, logfiles.ROTATE_KEEP = 20_000, 3
telemetry.configure(load_settings({"log_dir": Path(sys.argv[1])}), "test", worker=sys.argv[2])
print("open", flush=True)
sys.stdin.readline()  # until all have a file: one that has ended gives its own back
log = telemetry.get_logger()
for number in range(int(sys.argv[3])):
    log.info("happened", number=number)
    if number % 10 == 0:
        logging.getLogger("a.library").warning("told %s", number)
"""


def test_several_processes_rotate_their_own_files_and_tear_no_line(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITES, str(tmp_path), f"w{nth}", str(LINES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for nth in range(3)
    ]  # fmt: skip
    for child in children:
        assert child.stdout and child.stdout.readline() == "open\n"
    for child in children:
        child.communicate("go\n", timeout=60)
    assert [child.returncode for child in children] == [0, 0, 0]
    for slot in range(3):
        files = sorted(tmp_path.glob(f"test-{slot}.log*"), key=_age)
        assert len(files) == 4
        assert all(path.stat().st_size < 20_000 + 300 for path in files), "bounded by the limit and one line"
        lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert len({line["worker"] for line in lines}) == 1, "one process a file"
        numbers = [line["number"] for line in lines if "number" in line]
        assert numbers == list(range(numbers[0], LINES)), "in their order, and none is missing but the oldest"


def _age(path: Path) -> int:
    return -int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0


def test_files_rotate_at_a_hundred_megabytes_and_seven_are_kept(tmp_path: Path) -> None:
    file = open_log(tmp_path, lambda slot: f"x-{slot}.log")
    assert (file.maxBytes, file.backupCount) == (100 * 1024 * 1024, 7)
    file.close()


def test_a_header_begins_each_file_and_stands_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfiles, "ROTATE_BYTES", 40)
    path = tmp_path / "table.csv"
    for _ in range(2):
        file = LogFile(path, "a,b")
        for number in range(3):
            file.append(f"{number},{'x' * 10}")
        file.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    for one in files:
        first, *others = one.read_text().splitlines()
        assert first == "a,b" and "a,b" not in others


def test_a_disk_without_room_costs_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LogFile(Path("/dev/full"))
    for _ in range(10_000):
        file.append("x" * 100)
    file = LogFile(tmp_path / "x.log")
    file.append("before")
    monkeypatch.setattr(file, "maxBytes", 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as no_room:
        no_room.setattr(LogFile, "_open", full)
        file.append("lost, as the next file cannot be begun")
        file.append("lost too")
    file.append("after")
    assert (tmp_path / "x.log").read_text() == "after\n"
    assert (tmp_path / "x.log.1").read_text() == "before\n"


def test_a_folder_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="ZFLEET_LOG_DIR"):
        open_log(tmp_path / "file" / "logs", lambda slot: f"x-{slot}.log")
