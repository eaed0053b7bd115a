"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from zfleet.client import Client
    from zfleet.operator import Operator

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[F], F]

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
insecure = click.option(
    "--insecure", is_flag=True, default=None, help="While there are no API keys, serve other machines too."
)
gateway_url = click.option("--url", metavar="URL", help="The gateway; else ZFLEET_URL.")


def readable(context: click.Context, parameter: click.Parameter, prompt: str | None) -> str | None:
    """Refuse at once what the gateway would refuse later, in the words of a command line."""
    if prompt is None:
        if context.params.get("template") is None:  # read before, as it is eager
            raise click.MissingParameter(ctx=context, param=parameter)
        return None
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise click.UsageError("the prompt is not valid UTF-8", context) from None
    if not prompt.strip():
        raise click.UsageError("the prompt must not be blank", context)
    return prompt


def picture(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Return a handle of the gateway's as it is, and the path of a file that can be read; of several, a list."""
    from common.inputs import is_handle

    if isinstance(value, tuple):
        return [picture(context, parameter, one) for one in value] or None
    if value is None or is_handle(value):
        return value
    return click.Path(exists=True, dir_okay=False, readable=True, path_type=Path).convert(value, parameter, context)


def lora(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[dict[str, Any]] | None:
    """Return each NAME or NAME:SCALE as the API has it."""
    found: list[dict[str, Any]] = []
    for value in values:
        name, colon, scale = value.partition(":")
        try:
            found.append({"name": name, "scale": float(scale)} if colon else {"name": name})
        except ValueError:
            raise click.BadParameter(f"{value!r} is not NAME or NAME:SCALE", context, parameter) from None
    return found or None


def value(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str] | None:
    """Return NAME=TEXT, any number of times, as the API has it."""
    found: dict[str, str] = {}
    for pair in values:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=TEXT", context, parameter)
        if name in found:
            raise click.BadParameter(f"{name} is given twice", context, parameter)
        found[name] = text
    return found or None


def request(command: F) -> F:
    """Add the prompt and the fields of a request; they reach the command by the names that the API has.

    Left out are `metadata` and `webhook`, which are for programs, and `preview`, a file of `generate`'s.
    """
    options: Sequence[Callable[[F], F]] = (
        click.argument("prompt", required=False, callback=readable),
        click.option("--template", is_eager=True, metavar="NAME", help="A prompt template; see `zfleet templates`."),
        click.option(
            "--set",
            "values",
            callback=value,
            multiple=True,
            metavar="NAME=TEXT",
            help="What stands for one of its placeholders; may be repeated.",
        ),
        click.option("--model", help="An alias of `zfleet settings`' ZFLEET_MODELS; the first is the default."),
        click.option("--width", type=int, help="Pixels, a multiple of 16."),
        click.option("--height", type=int, help="Pixels, a multiple of 16."),
        click.option("--steps", type=int, help="Denoising steps."),
        click.option("--seed", type=int, help="The same seed gives the same picture."),
        click.option("-n", "--n", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures."),
        click.option("--negative-prompt", metavar="TEXT", help="What to keep out; needs a guidance scale above 0."),
        click.option("--guidance-scale", type=float, help="How strongly the prompt is followed."),
        click.option("--cfg-normalization", type=float, help="How far guidance may lengthen a step; 0: freely."),
        click.option("--cfg-truncation", type=float, help="Guidance ends once 1 - sigma is above this, 0 to 1."),
        click.option(
            "--init-image", callback=picture, metavar="FILE", help="The picture to start from, or its handle."
        ),
        click.option("--strength", type=float, help="How much of it is painted over, above 0 and up to 1."),
        click.option("--mask", "mask_image", callback=picture, metavar="FILE", help="Where to: white."),
        click.option("--control", "control_image", callback=picture, metavar="FILE", help="For the ControlNet."),
        click.option("--control-scale", type=float, help="How much that counts, 0 to 2."),
        click.option(
            "--reference",
            "reference_images",
            callback=picture,
            multiple=True,
            metavar="FILE",
            help="A picture to edit; may be repeated.",
        ),
        click.option(
            "--lora", "loras", callback=lora, multiple=True, metavar="NAME[:SCALE]", help="A LoRA; may be repeated."
        ),
        click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="Its queue."),
        click.option("--deadline", "deadline_s", type=float, metavar="SECONDS", help="From now; it is given up then."),
        click.option("--reject-if-late", is_flag=True, default=None, help="Refuse it now if it will be too late."),
        click.option("--format", type=click.Choice(["webp", "png", "jpeg"]), help="The picture's encoding."),
        click.option("--quality", type=click.IntRange(1, 100), help="For webp and jpeg."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def connect(url: str | None, **more: Any) -> Client:
    """Return a client of the gateway that the flag or the settings name, with ZFLEET_API_KEY."""
    from zfleet.client import Client

    where, key = _gateway(url)
    return Client(where, api_key=key, **more)


def operate(url: str | None) -> Operator:
    """Return the same with the calls of the admin scope."""
    from zfleet.operator import Operator

    where, key = _gateway(url)
    return Operator(where, api_key=key)


def _gateway(url: str | None) -> tuple[str, str | None]:
    from common.settings import load_settings

    settings = load_settings({"url": url})
    return settings.url, settings.api_key.get_secret_value() if settings.api_key else None


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print one object, or a list of them, as JSON."""
    rows = (
        [item.model_dump(mode="json") for item in value]
        if isinstance(value, Sequence)
        else value.model_dump(mode="json")
    )
    click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
