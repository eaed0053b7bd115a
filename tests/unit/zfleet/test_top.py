from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from common.cards import GpuReading, Health
from common.errors import ClientError
from common.fleet import Fleet, LineDepth, Recent, Run, WorkerView
from common.history import History, Point
from tests.servers import free_port
from tests.unit.zfleet.stub import Reply, StubGateway, problem
from zfleet import cli
from zfleet.client import Client
from zfleet.commands.top import Watch
from zfleet.top import Frame, shared, sparkline

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
LONG = "a-host-with-quite-a-long-name.example.gpu0.0123ab"


def worker(index: int, runs: int = 1) -> WorkerView:
    found = [
        Run(task_id=f"{index:04d}{n:028d}", tenant="acme", model="turbo", step=n, steps=8, started_at=NOW)
        for n in range(runs)
    ]
    reading = GpuReading(
        name="NVIDIA L4", index=index, memory_used_mb=20_000, memory_total_mb=23_034, utilisation_percent=97,
        temperature_c=71, power_w=68.4,
    )  # fmt: skip
    return WorkerView(
        name=f"host.gpu{index}.ab12cd" if index else LONG, host="host", pid=1, state="busy", device=f"cuda:{index}",
        gpu=reading, models=["turbo"], models_loaded=["turbo"], capacity=4, running=[run.task_id for run in found],
        images_done=1234, rss_mb=900, started_at=NOW - timedelta(hours=3), seen_at=NOW, runs=found,
    )  # fmt: skip


def fleet(workers: int = 2, runs: int = 1, queues: int = 2, **changes: Any) -> Fleet:
    health = Health(
        status="degraded", reasons=["GPUs lost: 1; see /api/workers"], uptime_seconds=5.0, gpu_memory_used_mb=1,
        pending_tasks=12, models_loaded=["turbo"], workers=workers,
    )  # fmt: skip
    depths = [
        LineDepth(model=f"model{i}", priority="normal", queued=10 + i, running=i, oldest_age_seconds=4.2)
        for i in range(queues)
    ]
    recent = Recent(tasks_per_minute=31.5, images_per_minute=40.0, error_ratio=0.034, p50_seconds=1.9, p95_seconds=4.4)
    found = Fleet(
        at=NOW, health=health, suspended=False, queues=depths, workers=[worker(i, runs) for i in range(workers)],
        recent=recent,
    )  # fmt: skip
    return found.model_copy(update=changes)


def history(count: int = 90) -> History:
    points = [
        Point(at=NOW, images=i, error_ratio=0.01, p50_seconds=2.0, p95_seconds=i / 10 or None) for i in range(count)
    ]
    return History(window="15m", step_seconds=10, points=points)


def shown(width: int = 80, height: int = 24, *, encoding: str = "utf-8", **changes: Any) -> list[str]:
    """The lines of a frame."""
    given: dict[str, Any] = {"url": "http://127.0.0.1:8080", "now": NOW, "fleet": fleet(), "history": history()}
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
    console = Console(file=raw, width=width, height=height, highlight=False)
    console.print(Frame(**(given | changes)))
    assert isinstance(raw.buffer, io.BytesIO)
    return raw.buffer.getvalue().decode(encoding).splitlines()


def test_workers_that_are_silent_or_drained_say_so() -> None:
    quiet = worker(1, 0).model_copy(update={"seen_at": NOW - timedelta(seconds=11)})
    drained = worker(2, 0).model_copy(update={"drained": True, "state": "idle"})
    draining = worker(3, 1).model_copy(update={"drained": True})
    found = fleet().model_copy(update={"workers": [quiet, drained, draining]})
    lines = shown(160, 60, fleet=found, now=NOW + timedelta(hours=1))
    states = [line.split()[1] for line in lines if line.startswith("host.gpu")]
    assert states == ["silent", "drained", "draining"], "by the fleet's clock, not the terminal's"


def test_the_figures_fit_into_a_terminal_of_80() -> None:
    (line,) = [line for line in shown(80) if "queued" in line]
    assert line.rstrip().endswith("errors 3.4%")


def test_all_that_matters_is_there() -> None:
    text = "\n".join(shown(160, 60))
    for word in (
        "DEGRADED", "GPUs lost: 1", "21 queued", "1 running", "32 tasks/min", "p50 1.9 s", "p95 4.4 s", "errors 3.4%",
        "model0", "4.2 s", LONG, "busy", "NVIDIA L4", "97%", "19.5/22G", "71°", "68W", "1/4", "1234", "3.0 h",
        "acme", "0/8", "█",
    ):  # fmt: skip
        assert word in text, word


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (200, 50), (100, 10)])
@pytest.mark.parametrize(("workers", "runs", "queues"), [(0, 0, 0), (1, 1, 1), (40, 4, 30)])
def test_it_fits_the_terminal(width: int, height: int, workers: int, runs: int, queues: int) -> None:
    lines = shown(width, height, fleet=fleet(workers, runs, queues), trouble="no gateway answers")
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= max(height, 20), "with a line of each at least"
    if workers == 40 and height > 20:
        assert sum(" more" in line for line in lines) == 3


@pytest.mark.parametrize("name", [LONG, "工作机器" * 15], ids=["long", "wide"])
def test_names_are_cut_before_figures(name: str) -> None:
    long = worker(1).model_copy(update={"name": name, "device": name, "gpu": None})
    queue = LineDepth(model=name, priority="normal", queued=10**6, running=4321, oldest_age_seconds=7200)
    text = "\n".join(shown(fleet=fleet().model_copy(update={"workers": [long], "queues": [queue]})))
    for figure in ("1/4", "1234", "3.0 h", "1000000", "4321", "2.0 h", "0/8"):
        assert figure in text, figure


def test_a_whole_frame_leaves_nothing_out() -> None:
    lines = shown(fleet=fleet(40, 1, 30), whole=True)
    assert not [line for line in lines if " more" in line]
    assert len(lines) > 110


def test_a_paused_fleet_and_an_empty_one() -> None:
    assert "PAUSED" in shown(fleet=fleet(suspended=True))[0]
    empty = "\n".join(shown(fleet=fleet(0, 0, 0, recent=Recent()), history=None))
    assert "No worker is alive." in empty and "No queues yet." in empty and "Nothing runs." in empty
    assert "p50 -" in empty


def test_runs_are_counted_as_they_are_listed() -> None:
    done = worker(1, runs=0).model_copy(update={"running": ["a"]})  # its card is as old as its last beat
    text = "\n".join(shown(160, 60, fleet=fleet(workers=0).model_copy(update={"workers": [done]})))
    assert "0/4" in text and "Nothing runs." in text


def test_what_is_old_says_so() -> None:
    lines = shown(now=NOW + timedelta(seconds=30), trouble="no gateway answers; trying again")
    assert lines[1] == "! no gateway answers; trying again (what follows is 30 s old)"
    assert shown(fleet=None, history=None, trouble="no gateway answers")[1] == "! no gateway answers"


def test_names_are_no_markup_and_no_control() -> None:
    odd = worker(1).model_copy(update={"name": "[bold]x[/bold]\x1b[2J\n"})
    text = "\n".join(shown(fleet=fleet(0).model_copy(update={"workers": [odd]})))
    assert "[bold]x[/bold]?[2J?" in text and "\x1b" not in text


def test_energy_has_a_line_where_anybody_tells_of_it() -> None:
    told = history()
    points = [point.model_copy(update={"joules_per_image": 812.4}) for point in told.points]
    (line,) = [line for line in shown(history=told.model_copy(update={"points": points})) if "J/image" in line]
    assert line.endswith("█  812")
    assert "J/image" not in "\n".join(shown())


def test_a_plain_terminal_gets_plain_marks() -> None:
    lines = shown(encoding="ascii", fleet=fleet(0, 0, 0))
    assert any("#" in line for line in lines if line.startswith("images/min"))


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 4, "    "),
        ([0, 0], 2, "▁▁"),
        ([1, 2, 4, 8], 4, "▂▃▅█"),
        ([None, 1.0], 4, "   █"),
        ([0, 8, 0, 0], 2, "█▁"),
        ([None, None, 1, None], 2, " █"),
    ],
    ids=str,
)
def test_a_sparkline(values: list[float | None], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@pytest.mark.parametrize(
    ("room", "wants", "given"),
    [(10, [2, 3, 4], [2, 3, 4]), (6, [1, 9, 9], [1, 3, 2]), (0, [5, 0, 5], [1, 0, 1]), (9, [], [])],
    ids=str,
)
def test_room_is_shared(room: int, wants: list[int], given: list[int]) -> None:
    assert shared(room, wants) == given


# What asks


def told(**changes: Any) -> Reply:
    return Reply(body=fleet(**changes).model_dump(mode="json"))


HISTORY = Reply(body={"window": "15m", "step_seconds": 10, "points": [{"at": NOW.isoformat(), "images": 3, "new": 1}]})


def watch(stub: StubGateway) -> Watch:
    return Watch(Client(stub.url, timeout_s=0.3))


def test_a_look_is_the_fleet_and_once_in_a_while_its_history() -> None:
    with StubGateway(told(), HISTORY, told(suspended=True)) as stub:
        looks = watch(stub)
        first, second = looks.look(), looks.look()
        assert [asked.path for asked in stub.asked] == ["/api/fleet", "/api/history?window=15m", "/api/fleet"]
    assert first.history is not None and first.history.points[0].images == 3
    assert second.history == first.history and second.fleet is not None and second.fleet.suspended


def test_no_history_is_no_reason_to_show_nothing() -> None:
    with StubGateway(told(), problem(404, "not_found")) as stub:
        frame = watch(stub).look()
    assert (frame.history, frame.trouble) == (None, "") and frame.fleet is not None


def test_a_gateway_that_goes_away_is_asked_again() -> None:
    with StubGateway(told(), HISTORY, problem(503, "redis_unavailable", "Redis did not answer"), told()) as stub:
        looks = watch(stub)
        assert looks.look().trouble == ""
        stub.replies.insert(1, stub.replies[0])  # as often as it is tried
        frame = looks.look()
        while frame.trouble:
            assert frame.trouble == "Redis did not answer; trying again" and frame.fleet is not None
            frame = looks.look()


def test_without_a_gateway_there_is_a_frame_that_says_so() -> None:
    frame = Watch(Client(f"http://127.0.0.1:{free_port()}", timeout_s=0.3)).look()
    assert frame.fleet is None and "no gateway answers" in frame.trouble
    assert "no gateway answers" in "\n".join(shown(fleet=None, history=None, trouble=frame.trouble))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda: problem(403, "forbidden"), "admin scope: zfleet keys create"),
        (lambda: problem(401, "unauthenticated"), "ZFLEET_API_KEY"),
    ],
    ids=["no admin", "no key"],
)
def test_a_key_that_is_not_good_for_it_ends_it_with_the_remedy(
    reply: Callable[[], Reply], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubGateway(reply()) as stub:
        with pytest.raises(ClientError):
            watch(stub).look()
        assert cli.main(["top", "--url", stub.url]) == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_once_is_one_frame(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(told(), HISTORY) as stub:
        assert cli.main(["top", "--once", "--url", stub.url]) == 0
    out, err = capsys.readouterr()
    assert out.count("zfleet http://") == 1 and err == ""
    assert cli.main(["top", "--once", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no gateway answers" in capsys.readouterr().err


@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGTERM], ids=["q", "Ctrl-C", "SIGTERM"])
def test_the_terminal_is_left_as_it_was_found(end: bytes | signal.Signals) -> None:
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    before = termios.tcgetattr(its)
    with StubGateway(told(), HISTORY, told()) as stub:
        process = _top(stub.url, its, TERM="xterm")
        said = _said(ours, b"host.gpu1")
        assert b"\x1b[?1049h" in said
        if isinstance(end, bytes):
            os.write(ours, end)
        else:
            process.send_signal(end)
        said += _said(ours, b"\x1b[?1049l")
        assert process.wait(10) == 0
    assert b"\x1b[?25h" in said, "the cursor is back"
    assert termios.tcgetattr(its) == before


def test_a_terminal_that_knows_no_commands_gets_frame_after_frame() -> None:
    ours, its = pty.openpty()
    with StubGateway(told(), HISTORY, told()) as stub:
        process = _top(stub.url, its, TERM="dumb")
        said = _said(ours, b"host.gpu1")
        os.write(ours, b"\x03")
        assert process.wait(10) == 0
    assert b"\x1b" not in said


def _top(url: str, terminal: int, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zfleet", "top", "--interval", "0.2", "--url", url]
    return subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip


def _said(terminal: int, until: bytes) -> bytes:
    """Read a terminal up to these words."""
    said = b""
    while until not in said:
        ready, _, _ = select.select([terminal], [], [], 15)
        assert ready, said
        said += os.read(terminal, 65536)
    return said
