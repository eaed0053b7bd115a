"""`zfleet queue`, `workers` and `templates`: how the fleet is doing, and what it has ready."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from zfleet.commands import options


@click.command()
@options.as_json
@options.gateway_url
def queue(as_json: bool, url: str | None) -> None:
    """Show the queues: depth, age of the oldest."""
    from common.schemas import PRIORITIES
    from zfleet.display import seconds, table

    with options.connect(url) as client:
        queues = sorted(client.queue(), key=lambda q: (q.model, PRIORITIES.index(q.priority), q.tenant))
    if as_json:
        options.print_json(queues)
        return
    rows = ((q.model, q.priority, q.tenant, q.queued, q.running, seconds(q.oldest_age_seconds)) for q in queues)
    table(["MODEL", "PRIORITY", "TENANT", "QUEUED", "RUNNING", "OLDEST"], rows)


@click.command()
@options.as_json
@options.gateway_url
def workers(as_json: bool, url: str | None) -> None:
    """Show the live workers.

    Each with its device, its models and what it is doing.
    """
    from zfleet.display import seconds, table

    with options.connect(url) as client:
        cards = client.workers()
    if as_json:
        options.print_json(cards)
        return
    now = datetime.now(UTC)
    rows = (
        (
            card.name,
            card.state,
            f"{card.device} ({card.gpu.name})" if card.gpu else card.device,
            ",".join(card.models),
            f"{len(card.running)}/{card.capacity}",
            card.images_done,
            f"{card.gpu.memory_used_mb} MB" if card.gpu and card.gpu.memory_used_mb is not None else None,
            seconds(max(0.0, (now - card.started_at).total_seconds())),
        )
        for card in cards
    )
    table(["WORKER", "STATE", "DEVICE", "MODELS", "RUNS", "IMAGES", "GPU MEMORY", "UP"], rows)


@click.command()
@options.as_json
@options.gateway_url
def templates(as_json: bool, url: str | None) -> None:
    """Show the prompt templates.

    Those of their placeholders that have no default are marked with *.
    """
    from zfleet.display import table

    with options.connect(url) as client:
        found = client.templates()
    if as_json:
        options.print_json(found)
        return
    rows = (
        (
            one.name,
            f"{one.title.en} · {one.title.zh}",
            one.model,
            f"{one.width}x{one.height}",
            " ".join(f"{part.name}{'*' if part.default is None else ''}" for part in one.placeholders),
        )
        for one in found
    )
    table(["NAME", "TITLE", "MODEL", "SIZE", "PLACEHOLDERS"], rows)
