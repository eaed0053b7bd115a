"""What `zfleet top` shows: the fleet in one frame of text that fits a terminal. Asks nobody anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.fleet import Fleet, WorkerView
from common.history import History
from zfleet.display import seconds

COLOURS = {"healthy": "green", "degraded": "yellow", "unhealthy": "red"}
RAMP, PLAIN_RAMP = "▁▂▃▄▅▆▇█", "_.-:=+*#"  # the second where the terminal knows no more than ASCII
LABEL = 14  # characters before a sparkline
FIGURE = 10  # and after it
BAR = 16
REASONS = 3
SILENT_S = 10  # workers tell of themselves every 3 s
NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """All that is known at a moment. `trouble` says why `fleet` is not of now, or not there at all."""

    url: str
    now: datetime
    fleet: Fleet | None
    history: History | None = None
    trouble: str = ""
    whole: bool = False  # whether nothing is left out to fit the terminal's height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = [*self._verdict(), *self._figures(options)]
        if self.fleet is None:
            yield Group(*head)
            return
        parts = [_queues(self.fleet), _workers(self.fleet, self.now), _runs(self.fleet)]
        most = [len(part.rows) for part in parts]
        if not self.whole:
            room = options.size.height - len(head) - len(parts) * 2 - 1  # a heading and an empty line each; a foot
            most = shared(max(0, room), most)
        yield Group(*head)
        for part, count in zip(parts, most, strict=True):
            yield Text("")
            yield part.table(count)

    def _verdict(self) -> Iterator[RenderableType]:
        line = Text("zfleet ", style="bold")
        line.append(f"{self.url}  ", style="dim")
        if self.fleet is not None:
            status = self.fleet.health.status
            line.append(status.upper(), style=f"bold {COLOURS[status]}")
            if self.fleet.suspended:
                line.append("  PAUSED: no task is begun", style="bold yellow")
            line.append(f"  {self.fleet.at.astimezone():%H:%M:%S}", style="dim")
        yield _one_line(line)
        if self.trouble:
            age = "" if self.fleet is None else f" (what follows is {_age(self.fleet.at, self.now)} old)"
            yield _one_line(Text(f"! {self.trouble}{age}", style="bold red"))
        for reason in self.fleet.health.reasons[:REASONS] if self.fleet else ():
            yield _one_line(Text(f"! {reason}", style="yellow"))

    def _figures(self, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.fleet is None:
            return
        recent, queues = self.fleet.recent, self.fleet.queues
        told = [
            f"{sum(queue.queued for queue in queues)} queued",
            f"{sum(queue.running for queue in queues)} running",
            f"{_number(recent.tasks_per_minute)} tasks/min",
            f"p50 {seconds(recent.p50_seconds) or NONE}",
            f"p95 {seconds(recent.p95_seconds) or NONE}",
            f"errors {_percent(recent.error_ratio)}",
        ]
        yield _one_line(Text(" · ".join(told)))
        if self.history is not None and self.history.points:
            yield from _trends(self.history, options)


@dataclass(frozen=True)
class _Part:
    """A table, of which only so many rows may be shown. A column that begins with `>` stands at the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[RenderableType]]
    nothing: str

    def table(self, most: int) -> RenderableType:
        if not self.rows:
            return Text(self.nothing, style="dim")
        table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
        for column in self.columns:
            name = column.removeprefix(">")
            figure = name != column
            # where it is too wide, names are cut before figures: rich shortens the widest of those that may wrap
            table.add_column(name, justify="right" if figure else "left", no_wrap=figure, overflow="ellipsis")
        shown = self.rows if most >= len(self.rows) else self.rows[: max(0, most - 1)]
        for row in shown:
            table.add_row(*(_one_line(Text(cell) if isinstance(cell, str) else cell) for cell in row))
        if len(shown) == len(self.rows):
            return table
        return Group(table, Text(f"… {len(self.rows) - len(shown)} more", style="dim"))


def shared(room: int, wants: Sequence[int]) -> list[int]:
    """Return how many lines each gets of those there are: an equal part, and what others leave; at least one."""
    given = [min(want, 1) for want in wants]
    while sum(given) < room and (short := [i for i, want in enumerate(wants) if given[i] < want]):
        given[min(short, key=lambda i: given[i])] += 1
    return given


def sparkline(values: Sequence[float | None], width: int, ramp: str = RAMP) -> str:
    """Return values as a line of so many characters, the newest last: each the largest of those it stands for.

    The highest is their maximum, the lowest nothing; what nobody knows is a blank.
    """
    if len(values) > width:
        cuts = [len(values) * i // width for i in range(width + 1)]
        groups = [[value for value in values[a:b] if value is not None] for a, b in pairwise(cuts)]
        values = [max(group, default=None) for group in groups]
    top = max((value for value in values if value is not None), default=0.0)
    marks = (
        " " if value is None else ramp[min(len(ramp) - 1, int(value / top * len(ramp))) if top else 0]
        for value in values
    )
    return "".join(marks).rjust(width)


def _trends(history: History, options: ConsoleOptions) -> Iterator[RenderableType]:
    points = history.points
    per_minute = [None if p.images is None else p.images * 60 / history.step_seconds for p in points]
    joules = [p.joules_per_image for p in points]
    rows: list[tuple[str, Sequence[float | None], Callable[[float | None], str | None]]] = [
        ("images/min", per_minute, _number),
        ("p50", [p.p50_seconds for p in points], seconds),
        ("p95", [p.p95_seconds for p in points], seconds),
        ("errors", [p.error_ratio for p in points], _percent),
        *([("J/image", joules, _number)] if any(joules) else []),
    ]
    ramp = PLAIN_RAMP if options.ascii_only else RAMP
    width = max(10, min(len(points), options.max_width - LABEL - FIGURE))
    for name, values, told in rows:
        newest = next((value for value in reversed(values) if value is not None), None)
        line = Text(name.ljust(LABEL), style="dim")
        line.append(sparkline(values, width, ramp), style="cyan")
        line.append(f"  {told(newest) or NONE}")
        yield _one_line(line)


def _queues(fleet: Fleet) -> _Part:
    rows = [
        [_name(q.model), q.priority, str(q.queued), str(q.running), seconds(q.oldest_age_seconds) or NONE]
        for q in fleet.queues
    ]
    return _Part(["QUEUE", "PRIORITY", ">QUEUED", ">RUNNING", ">OLDEST"], rows, "No queues yet.")


def _workers(fleet: Fleet, now: datetime) -> _Part:
    columns = ["WORKER", "STATE", "DEVICE", ">UTIL", ">MEMORY", ">TEMP", ">POWER", ">RUNS", ">IMAGES", ">UP"]
    return _Part(columns, [_worker(worker, fleet.at, now) for worker in fleet.workers], "No worker is alive.")


def _worker(worker: WorkerView, at: datetime, now: datetime) -> list[RenderableType]:
    gpu = worker.gpu
    memory = None if gpu is None or gpu.memory_used_mb is None else f"{gpu.memory_used_mb / 1024:.1f}"
    if gpu is not None and memory and gpu.memory_total_mb:
        memory += f"/{gpu.memory_total_mb / 1024:.0f}G"
    state = _state(worker, at)
    colour = {"lost": "red", "silent": "red", "busy": "green"}.get(state, "" if state == "idle" else "yellow")
    return [
        _name(worker.name),
        Text(state, style=colour),
        _name(gpu.name if gpu else worker.device),
        NONE if gpu is None or gpu.utilisation_percent is None else f"{gpu.utilisation_percent}%",
        memory or NONE,
        NONE if gpu is None or gpu.temperature_c is None else f"{gpu.temperature_c}°",
        NONE if gpu is None or gpu.power_w is None else f"{gpu.power_w:.0f}W",
        f"{len(worker.runs)}/{worker.capacity}",
        str(worker.images_done),
        _age(worker.started_at, now),
    ]


def _state(worker: WorkerView, at: datetime) -> str:
    """Return what a worker says it is, unless nothing was heard of it by then or it is drained by hand."""
    if (at - worker.seen_at).total_seconds() > SILENT_S:
        return "silent"
    if worker.drained and worker.state in ("idle", "busy"):
        return "draining" if worker.runs else "drained"
    return worker.state


def _runs(fleet: Fleet) -> _Part:
    rows: list[list[RenderableType]] = [
        [
            _name(run.task_id[:12]),
            _name(run.model),
            _name(run.tenant),
            ProgressBar(total=max(1, run.steps), completed=run.step, width=BAR),
            f"{run.step}/{run.steps}",
            _name(worker.name),
        ]
        for worker in fleet.workers
        for run in worker.runs
    ]
    return _Part(["TASK", "MODEL", "TENANT", "PROGRESS", ">STEP", "WORKER"], rows, "Nothing runs.")


def _name(text: str) -> Text:
    """Return what somebody else has named, with nothing in it that a terminal would obey."""
    return Text("".join(one if one.isprintable() else "?" for one in text))


def _one_line(cell: RenderableType) -> RenderableType:
    if isinstance(cell, Text):
        cell.no_wrap, cell.overflow = True, "ellipsis"
    return cell


def _age(since: datetime, now: datetime) -> str:
    return seconds(max(0.0, (now - since).total_seconds())) or NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _percent(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio * 100:.1f}%"
