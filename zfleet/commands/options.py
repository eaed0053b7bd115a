"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from zfleet.client import Client

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[F], F]

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
gateway_url = click.option("--url", metavar="URL", help="The gateway; else ZFLEET_URL.")


def readable(context: click.Context, _parameter: click.Parameter, prompt: str) -> str:
    """Refuse at once what the gateway would refuse later, in the words of a command line."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise click.UsageError("the prompt is not valid UTF-8", context) from None
    if not prompt.strip():
        raise click.UsageError("the prompt must not be blank", context)
    return prompt


def request(command: F) -> F:
    """Add the prompt and every field of a request; they reach the command by the names that the API has."""
    options: Sequence[Callable[[F], F]] = (
        click.argument("prompt", callback=readable),
        click.option("--model", help="An alias of `zfleet settings`' ZFLEET_MODELS; the first is the default."),
        click.option("--width", type=int, help="Pixels, a multiple of 16."),
        click.option("--height", type=int, help="Pixels, a multiple of 16."),
        click.option("--steps", type=int, help="Denoising steps."),
        click.option("--seed", type=int, help="The same seed gives the same picture."),
        click.option("-n", "--n", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures."),
        click.option("--negative-prompt", metavar="TEXT", help="What to keep out; needs a guidance scale above 0."),
        click.option("--guidance-scale", type=float, help="How strongly the prompt is followed."),
        click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="Its queue."),
        click.option("--format", type=click.Choice(["webp", "png", "jpeg"]), help="The picture's encoding."),
        click.option("--quality", type=click.IntRange(1, 100), help="For webp and jpeg."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def connect(url: str | None) -> Client:
    """Return a client of the gateway that the flag or the settings name."""
    from common.settings import load_settings
    from zfleet.client import Client

    return Client(load_settings({"url": url}).url)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print one object, or a list of them, as JSON."""
    rows = (
        [item.model_dump(mode="json") for item in value]
        if isinstance(value, Sequence)
        else value.model_dump(mode="json")
    )
    click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
