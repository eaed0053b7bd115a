"""`zfleet generate`: a prompt in, a file out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from common.schemas import TaskView
    from zfleet.client import Client

INTERRUPTED = 130  # the exit code a shell expects after Ctrl-C
CANCEL_TIMEOUT_S = 5.0


@click.command()
@options.request
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; with -n 2, FILE-1 and FILE-2.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Cancel it after this.")
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the newest preview there while it is painted, as WebP.",
)
@options.gateway_url
def generate(
    output: Path | None, timeout: float | None, preview: Path | None, url: str | None, n: int, **fields: Any
) -> None:
    """Make a picture from PROMPT and save it.

    Ctrl-C cancels the task.
    """
    from zfleet import pictures
    from zfleet.client import TaskFailed

    try:
        if output is not None:
            fields["format"] = fields["format"] or pictures.format_of(output)
        previews = [] if preview is None else [preview]
        pictures.require_writable([*pictures.targets(output or Path("picture"), n), *previews])
    except pictures.CannotWrite as error:
        raise click.UsageError(error.message) from None
    with options.connect(url) as client:
        task_id = client.submit(n=n, preview=True if preview else None, **fields).task_id
        view = _wait(client, task_id, timeout, preview)
        if view.status != "succeeded":
            raise TaskFailed(view)
        save(client, view, output or Path(f"{task_id}.{view.request.format}"))


def save(client: Client, view: Any, output: Path) -> None:
    """Fetch the pictures of a succeeded task, write them and print where they are."""
    from zfleet import pictures

    for warning in view.warnings:
        click.echo(f"zfleet: warning: {warning}", err=True)
    paths = pictures.targets(output, len(view.images))
    for path, data in zip(paths, client.images(view), strict=True):
        try:
            pictures.write(path, data)
        except pictures.CannotWrite as error:
            raise pictures.CannotWrite(
                f"{error.message}; the picture is still at {client.url}view/…, see `zfleet status {view.task_id}`"
            ) from None
        click.echo(path)


def _wait(client: Client, task_id: str, timeout: float | None, preview: Path | None) -> Any:
    """Return the final status; whatever ends the wait earlier cancels the task, as nobody would fetch the picture."""
    from zfleet.client import NotInTime
    from zfleet.display import TaskProgress

    shown = None

    def show(view: TaskView) -> None:
        nonlocal shown
        progress.show(view)
        if preview and view.progress.preview not in (None, shown):
            shown = view.progress.preview
            _keep(shown, preview)

    try:
        with TaskProgress() as progress:
            return client.wait(task_id, timeout, show)
    except KeyboardInterrupt:
        click.echo(f"zfleet: {_cancel(client.url, task_id)}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except NotInTime as late:
        late.message += f"; {_cancel(client.url, task_id)}"
        raise


def _keep(url: str, path: Path) -> None:
    """Write a preview; where that fails the picture itself is not given up for it."""
    from zfleet import pictures

    try:
        pictures.write(path, pictures.from_data_url(url))
    except pictures.CannotWrite as error:
        click.echo(f"zfleet: warning: {error.message}", err=True)


def _cancel(url: str, task_id: str) -> str:
    """Cancel over a connection of its own, as the other may be in the middle of an answer; return what came of it."""
    from common.errors import ClientError

    with options.connect(url, timeout_s=CANCEL_TIMEOUT_S) as client:
        try:
            client.cancel(task_id)
        except ClientError as error:
            return f"task {task_id} could not be canceled: {error.message}"
    return f"task {task_id} is canceled"
