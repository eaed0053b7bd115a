"""`zfleet submit`, `status` and `cancel`: a task by its id."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from common.schemas import TaskView

LONGEST_WAIT_S = 30.0  # asked of the gateway at a time


@click.command()
@options.request
@options.as_json
@options.gateway_url
def submit(as_json: bool, url: str | None, **fields: Any) -> None:
    """Hand in PROMPT and print its task's id."""
    with options.connect(url) as client:
        answer = client.submit(**fields)
    if as_json:
        options.print_json(answer)
    else:
        click.echo(answer.task_id)


@click.command()
@click.argument("task_id", metavar="ID")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait for its end this long."
)
@options.as_json
@options.gateway_url
def status(task_id: str, wait: float, as_json: bool, url: str | None) -> None:
    """Show how a task is doing.

    Exit code 1 when it has failed or expired.
    """
    from zfleet.client import TaskFailed

    until = time.monotonic() + wait
    with options.connect(url) as client:
        view = client.status(task_id, min(wait, LONGEST_WAIT_S))
        while not view.status.final and (left := until - time.monotonic()) > 0:
            view = client.status(task_id, min(left, LONGEST_WAIT_S))
        if as_json:
            options.print_json(view)
        else:
            _print(view, client.url)
    if view.status in ("failed", "expired"):
        raise TaskFailed(view)


@click.command()
@click.argument("task_id", metavar="ID")
@options.as_json
@options.gateway_url
def cancel(task_id: str, as_json: bool, url: str | None) -> None:
    """Cancel a task.

    A queued one is gone at once, a running one stops at its next step.
    """
    with options.connect(url) as client:
        view = client.cancel(task_id)
    if as_json:
        options.print_json(view)
    else:
        click.echo(view.status if view.status.final else f"{view.status}, stops at its next step")


def _print(view: TaskView, url: str) -> None:
    from urllib.parse import urljoin

    from zfleet.display import seconds

    request = view.request
    rows: list[tuple[str, object]] = [
        ("status", view.status),
        ("model", f"{view.model}, {request.width}x{request.height}, seed {request.seed}"),
        ("progress", f"{view.progress.step} of {view.progress.steps} steps"),
        ("ahead", view.position),
        ("expected in", seconds(view.eta_seconds)),
        ("total", seconds(view.timings.total_ms / 1000) if view.timings.total_ms is not None else None),
        *(("attempt", f"{attempt.worker}: {attempt.outcome}") for attempt in view.attempts),
        *(("warning", warning) for warning in view.warnings),
        *(("image", urljoin(url, image.url)) for image in view.images),
    ]
    for name, value in rows:
        if value is not None:
            click.echo(f"{name:<12}{value}")
