"""`zfleet logs` over files as the fleet, Nginx and logrotate leave them."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from zfleet import cli
from zfleet.logs import FOLLOW_EVERY_S, Search

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f" * 32
REQUEST = "req-1"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ZFLEET_"):
            monkeypatch.delenv(name)


def line(second: float, role: str, event: str, **fields: object) -> str:
    fields = {"task_id": TASK, "request_id": REQUEST, "level": "info"} | fields
    told = {name: value for name, value in fields.items() if value is not None}
    return json.dumps({"time": f"2026-01-31T12:00:{second:06.3f}Z", "role": role, "event": event, **told}) + "\n"


def noise(count: int, task: str = OTHER) -> str:
    return line(0, "worker", "attempt_started", task_id=task, request_id="another") * count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logs = tmp_path / "the logs"
    logs.mkdir()
    submit = {"method": "POST", "status": 202, "task_id": TASK}
    poll = {"method": "GET", "status": 200, "route": "/api/status/<task_id>", "request_id": "poll-1"}
    nginx = '{"time":"2026-01-31T13:00:01.010+01:00","request_id":"%s","method":"%s","path":"%s","status":%s}\n'
    (logs / "access.log.2.gz").write_bytes(
        gzip.compress(
            (
                nginx % (REQUEST, "POST", "/api/submit", 202)
                + nginx % ("poll-1", "GET", f"/api/status/{TASK}", 200)
                + nginx % ("x", "GET", "/", 200)
            ).encode()
        )
    )
    (logs / "access.log").write_text("")
    (logs / "gateway-0.log.1").write_text(noise(50) + line(1.0, "gateway", "request", route="/api/submit", **submit))
    (logs / "gateway-0.log").write_text(line(5, "gateway", "request", **poll) + noise(5))
    (logs / "worker-0.log").write_text(
        noise(3) + line(2, "worker", "attempt_started", attempt=1, worker="w.1")
        + line(2.5, "worker", "step_failed", task_id=None, request_id=None, task_ids=[OTHER, TASK], level="warning")
        + f'{{"time":"2026-01-31T12:00:02.7Z","task_id":"{TASK}","ev'
    )  # fmt: skip
    (logs / "worker-1.log").write_text(
        line(4, "worker", "attempt_started", attempt=2, worker="w.2")
        + line(4.5, "worker", "attempt_ended", attempt=2, outcome="failed", code="x\x1b[31m", level="error")
    )
    (logs / "supervisor-0.log").write_text(line(3, "supervisor", "task_reaped", attempt=1) + "no JSON at all\n")
    (logs / "gpu.csv").write_text(TASK)
    return logs


def test_a_story_is_told_from_all_files_in_the_order_of_time(folder: Path) -> None:
    story = Search([folder], task=TASK).gather()
    told = [(one.role, one.fields["event"]) for one in story.lines]
    assert told == [
        ("gateway", "request"), ("nginx", "request"), ("nginx", "request"), ("worker", "attempt_started"),
        ("worker", "step_failed"), ("supervisor", "task_reaped"), ("worker", "attempt_started"),
        ("worker", "attempt_ended"), ("gateway", "request"),
    ]  # fmt: skip
    assert story.requests == {REQUEST}, "a poll's is none that the task came with"
    assert (story.files, story.broken, story.unread) == (7, 1, [])


def test_by_its_request_the_same_task_is_found_without_what_others_asked_of_it(folder: Path) -> None:
    story = Search([folder], request=REQUEST).gather()
    assert [one.role for one in story.lines] == ["gateway", "nginx", "worker", "supervisor", "worker", "worker"]


def test_the_command_shows_what_happened_and_leaves_out_who_only_looked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["logs", "--task", TASK, "--log-dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 7 and "\x1b" not in out
    assert "nginx" in lines[1] and "path=/api/submit" in lines[1] and "status=202" in lines[1]
    assert "attempt_ended" in lines[-1] and "outcome=failed" in lines[-1]
    assert "2 that only looked" in err and "1 broken" in err
    assert cli.main(["logs", "--task", TASK, "--log-dir", str(folder), "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_as_json_the_lines_are_what_was_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "--task", TASK, "--log-dir", str(folder), "--json"]) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(lines) == 9
    assert lines[-2]["code"] == "x\x1b[31m"


def test_it_looks_where_the_settings_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZFLEET_LOG_DIR", str(folder))
    assert cli.main(["logs", "--request", REQUEST]) == 0
    monkeypatch.delenv("ZFLEET_LOG_DIR")
    monkeypatch.setenv("ZFLEET_DATA_DIR", str(tmp_path))
    capsys.readouterr()
    assert cli.main(["logs", "--request", REQUEST]) == 1
    assert f"no folder {tmp_path / 'logs'}" in capsys.readouterr().err
    folder.rename(tmp_path / "logs")
    assert cli.main(["logs", "--request", REQUEST]) == 0


@pytest.mark.parametrize("args", [[], ["--task", TASK, "--request", "x"], ["--task", "a b"], ["--task", "../x"]])
def test_a_mistake_is_told(args: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", *args, "--log-dir", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_found_says_where_it_looked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "worker-9.log.1.gz").write_bytes(gzip.compress(noise(100).encode())[:60])
    assert cli.main(["logs", "--task", "nobody", "--log-dir", str(folder)]) == 1
    complaint = capsys.readouterr().err
    assert "8 files" in complaint and str(folder) in complaint and "worker-9.log.1.gz" in complaint


def test_large_files_are_searched_in_little_memory(folder: Path) -> None:
    block = noise(5_000)
    with (folder / "worker-2.log").open("w") as file:
        for nth in range(40):
            file.write(block)
            if nth == 20:
                file.write(line(9, "worker", "attempt_ended"))
    (folder / "worker-3.log").write_bytes(b"\0" * 20_000_000)  # no line at all, as after a power cut
    assert (folder / "worker-2.log").stat().st_size > 25_000_000
    tracemalloc.start()
    try:
        story = Search([folder], task=TASK).gather()
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    assert len(story.lines) == 10


def test_following_tells_each_new_line_once_and_over_a_rotation(folder: Path) -> None:
    search = Search([folder], task=TASK)
    assert len(search.gather().lines) == 9
    heard: list[str] = []
    following = search.follow()
    thread = threading.Thread(
        target=lambda: heard.extend(next(following).fields["event"] for _ in range(3)), daemon=True
    )
    thread.start()
    with (folder / "supervisor-0.log").open("a") as file:
        file.write(line(7, "supervisor", "first") + noise(2))
    time.sleep(FOLLOW_EVERY_S)
    with (folder / "supervisor-0.log").open("a") as file:
        file.write(line(8, "supervisor", "second"))
    (folder / "supervisor-0.log").rename(folder / "supervisor-0.log.1")
    (folder / "supervisor-0.log").write_text(line(9, "supervisor", "third"))
    thread.join(10)
    assert sorted(heard) == ["first", "second", "third"]


def test_lines_that_are_none_of_ours_break_no_story(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = {"time": "0001-01-01T00:00:00+14:00", "task_id": TASK}  # a moment before all time
    odd = line(6, "\x1b]0;a", "\x1b[2J\nb", request_id=["no", "text"], **{"c\x1b": 1})
    (folder / "odd.log").write_text(json.dumps(forged) + "\n" + "[" * 100_000 + TASK + "\n" + odd)
    os.mkfifo(folder / "pipe.log")
    assert cli.main(["logs", "--task", TASK, "--log-dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8 and "\x1b" not in out
    assert "3 broken" in err


def test_following_goes_on_after_a_file_was_emptied_and_after_what_is_no_line(folder: Path) -> None:
    search = Search([folder], task=TASK)
    search.gather()
    heard: list[str] = []
    following = search.follow()
    thread = threading.Thread(
        target=lambda: heard.extend(next(following).fields["event"] for _ in range(2)), daemon=True
    )
    thread.start()
    (folder / "worker-1.log").write_text("")
    with (folder / "worker-0.log").open("ab") as file:
        file.write(b"\0" * 3_000_000 + b"\n" + line(7, "worker", "after it").encode())
    time.sleep(FOLLOW_EVERY_S * 2)
    with (folder / "worker-1.log").open("a") as file:
        file.write(line(8, "worker", "emptied"))
    thread.join(10)
    assert sorted(heard) == ["after it", "emptied"]
