"""`zfleet logs`: a task's story, from the logs of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from rich.text import Text

    from zfleet.logs import Line, Search, Story

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
APART = ("time", "level", "role", "event", "task_id", "request_id")  # fields that have a place of their own, or none
COLOURS = {"warning": "yellow", "error": "red", "critical": "red"}


def _id(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    if value is not None and not ID.fullmatch(value):
        raise click.BadParameter("an id is 1 to 64 of A-Z a-z 0-9 . _ -", context, parameter)
    return value or ""


@click.command()
@click.option("--task", callback=_id, metavar="ID", help="A task, with the request that made it.")
@click.option("--request", callback=_id, metavar="ID", help="A request by its X-Request-ID, with the task it made.")
@click.option(
    "--log-dir", "folders", multiple=True, type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
    help="Where logs are, as also Nginx's; may be repeated. Else ZFLEET_LOG_DIR, or what `zfleet up` uses.",
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Show polls and downloads as well.")
@click.option("--follow", "-f", is_flag=True, help="Go on as lines are written, until Ctrl-C.")
@options.as_json
def logs(task: str, request: str, folders: Sequence[Path], everything: bool, follow: bool, as_json: bool) -> None:
    """Gather what this machine's logs say of a task.

    Nginx, gateway, worker, supervisor and webhooks, rotated files among them, in the order of time.
    """
    from zfleet.logs import Search

    if bool(task) == bool(request):
        raise click.UsageError("name one of --task ID and --request ID")
    where = _folders(folders)
    search = Search(where, task=task, request=request)
    story = search.gather()
    shown = [line for line in story.lines if as_json or everything or not line.is_reading]
    if not story.lines and not follow:
        raise click.ClickException(_nothing(f"task {task}" if task else f"request {request}", story, where))
    for line in shown:
        _print(line, as_json)
    _remarks(story, hidden=len(story.lines) - len(shown))
    if follow:
        _follow(search, as_json, everything)


def _follow(search: Search, as_json: bool, everything: bool) -> None:
    for line in search.follow():
        if as_json or everything or not line.is_reading:
            _print(line, as_json)


def _folders(given: Sequence[Path]) -> Sequence[Path]:
    from common.settings import load_settings

    settings = load_settings()
    folders = given or [settings.log_dir or settings.data_dir / "logs"]
    for folder in folders:
        if not folder.is_dir():
            raise click.ClickException(f"there is no folder {folder}; say by --log-dir where the logs are")
    return folders


def _nothing(what: str, story: Story, where: Sequence[Path]) -> str:
    looked = f"looked through {story.files} files ({story.bytes / 1e6:.1f} MB) in {', '.join(map(str, where))}"
    unread = f"; could not read {'; '.join(story.unread)}" if story.unread else ""
    broken = f"; left out {story.broken} broken lines that name it" if story.broken else ""
    elsewhere = "Its lines may be on another machine, or older than the files"
    return f"nothing about {what} here: {looked}{unread}{broken}. {elsewhere}"


def _remarks(story: Story, *, hidden: int) -> None:
    """Tell on stderr what the lines themselves do not."""
    if hidden:
        click.echo(f"Left out: {hidden} that only looked (polls, downloads); --all shows them.", err=True)
    if story.broken:
        click.echo(f"Left out: {story.broken} broken.", err=True)
    for reason in story.unread:
        click.echo(f"Could not read {reason}", err=True)


def _print(line: Line, as_json: bool) -> None:
    if as_json:
        click.echo(line.text)
        return
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(_readable(line))


def _readable(line: Line) -> Text:
    from rich.text import Text

    fields = line.fields
    colour = COLOURS.get(str(fields.get("level")), "")
    text = Text(f"{line.at:%Y-%m-%d %H:%M:%S}.{line.at.microsecond // 1000:03d}  ", "dim")
    text.append(f"{_printable(line.role):<11}", "cyan")
    text.append(f"{_printable(fields.get('event', '')):<16}", colour or "bold")
    for name, value in _others(fields).items():
        text.append(f"  {name}=", "dim").append(value, colour)
    return text


def _others(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the other fields that say something, each on one line and with nothing that a terminal would obey."""
    told = {name: value for name, value in fields.items() if name not in APART and value not in (None, "")}
    return {_printable(name): _printable(value) for name, value in told.items()}


def _printable(value: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))
