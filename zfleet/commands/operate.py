"""`zfleet pause`, `resume`, `drain` and `restart`: what an operator has the fleet do. They need an admin's key."""

from __future__ import annotations

import click

from zfleet.commands import options


@click.command()
@options.gateway_url
def pause(url: str | None) -> None:
    """Have no task begun any more.

    What runs goes on; submits are accepted and wait. As `rq suspend`.
    """
    with options.operate(url) as operator:
        operator.pause()
    click.echo("paused; go on with `zfleet resume`")


@click.command()
@options.gateway_url
def resume(url: str | None) -> None:
    """Let tasks begin again.

    As `rq resume`.
    """
    with options.operate(url) as operator:
        operator.resume()
    click.echo("resumed")


@click.command()
@click.argument("name", metavar="WORKER")
@click.option("--undo", is_flag=True, help="Let it claim again.")
@options.gateway_url
def drain(name: str, undo: bool, url: str | None) -> None:
    """Have a worker claim nothing more.

    It finishes what it has and keeps its models. WORKER is a name of `zfleet workers`, with or without its last part;
    it holds for whoever takes the worker's place, too.
    """
    with options.operate(url) as operator:
        if undo:
            click.echo(f"{operator.resume_worker(name).name} claims again")
        else:
            worker = operator.drain(name)
            click.echo(f"{worker.name} claims nothing more, and finishes {len(worker.runs)} tasks")


@click.command()
@click.argument("name", metavar="WORKER")
@options.gateway_url
def restart(name: str, url: str | None) -> None:
    """Start a worker anew.

    It finishes what it has before; no crash is counted.
    """
    with options.operate(url) as operator:
        worker = operator.restart(name)
    click.echo(f"{worker.name} finishes what it has; another takes its place")
