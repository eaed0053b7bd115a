"""`zfleet keys`: who may use the fleet. Straight on Redis, so that the first key needs none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from common.apikeys import KeyView, MadeKey
    from common.broker import Broker

SPAN = re.compile(r"([1-9][0-9]{0,4})([smhdw])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
COLUMNS = ["ID", "TENANT", "STATE", "SCOPE", "PRIORITY", "RATE", "QUEUED", "RUNNING", "SHARE", "CREATED", "ENDS"]
SOON = "gateways know within two seconds"


def tenant(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse what is no tenant's name."""
    from common.apikeys import TENANT

    if not TENANT.fullmatch(value):
        says = "is not 1 to 32 of a-z, 0-9 and -, with no - in front"
        raise click.BadParameter(f"{value!r} {says}", context, parameter)
    return value


def rate(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what is no rate."""
    from common.apikeys import RATE

    if value is not None and not RATE.fullmatch(value):
        says = "is no rate; write 10/s, or so many each m, h or d"
        raise click.BadParameter(f"{value!r} {says}", context, parameter)
    return value


def share(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse a share that is out of bounds, NaN among them."""
    from common.apikeys import SHARES

    lowest, highest = SHARES
    if value is not None and not lowest <= value <= highest:
        raise click.BadParameter(f"{value:g} is not from {lowest:g} to {highest:g}", context, parameter)
    return value


def span(context: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    """Return a time as 90d or 1h."""
    match = SPAN.fullmatch(value) if value is not None else None
    if value is not None and match is None:
        says = "is no time; write 90d, or so many s, m, h or w"
        raise click.BadParameter(f"{value!r} {says}", context, parameter)
    return timedelta(**{UNITS[match[2]]: int(match[1])}) if match else None


def key_id(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse what is no key's id, without repeating it: it may be a whole key."""
    from common.apikeys import KEY_ID

    if not KEY_ID.fullmatch(value):
        says = "that is no key's id, the 12 digits between zfk_ and the next _; see `zfleet keys list`"
        raise click.BadParameter(says, context, parameter)
    return value


@click.group(invoke_without_command=True)
@click.pass_context
def keys(context: click.Context) -> None:
    """API keys: who may use this fleet, and how much.

    They are kept on Redis (ZFLEET_REDIS_URL). Once the first is made, nobody is served without one.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@keys.command()
@click.option("--tenant", required=True, callback=tenant, metavar="NAME", help="Whose key: a team, a product.")
@click.option(
    "--priority-max", type=click.Choice(["high", "normal", "low"]), default="high", show_default=True,
    help="The highest that its tasks may have.",
)  # fmt: skip
@click.option("--rate", callback=rate, metavar="N/UNIT", help="Submits and uploads, as 10/s; units are s, m, h, d.")
@click.option("--max-queued", type=click.IntRange(min=1), metavar="N", help="Its tasks in line.")
@click.option("--max-running", type=click.IntRange(min=1), metavar="N", help="Its tasks on GPUs.")
@click.option(
    "--share", type=float, callback=share, metavar="X",
    help="The tenant's part of the GPUs against others' (1), whatever key; 0.01 to 100.",
)  # fmt: skip
@click.option("--expires", callback=span, metavar="TIME", help="As 90d; units are s, m, h, d, w.")
@click.option("--admin", is_flag=True, help="It sees and steers everybody's tasks.")
def create(share: float | None, expires: timedelta | None, **fields: Any) -> None:
    """Make a key and print it, this once.

    The key alone is on stdout.
    """
    from common.apikeys import NewKey

    now = datetime.now(UTC)
    new = NewKey(share=share, expires_at=now + expires if expires else None, **fields)
    with _broker() as broker:
        first = not broker.guarded()
        made = broker.make_key(new, at=now)
    _tell(made)
    if first:
        click.echo(f"zfleet: it is the first one here: from now on nobody is served without a key ({SOON})", err=True)


@keys.command("list")
@options.as_json
def list_keys(as_json: bool) -> None:
    """Show all keys with their limits, but for the keys themselves."""
    from common.apikeys import KeyView
    from zfleet.display import table

    with _broker() as broker:
        found, shares = broker.all_keys(), broker.shares()
    views = [KeyView.of(key, shares, datetime.now(UTC)) for key in found]
    if as_json:
        options.print_json(views)
    else:
        table(COLUMNS, map(_cells, views))


@keys.command()
@click.argument("key_id", metavar="ID", callback=key_id)
def revoke(key_id: str) -> None:
    """Let a key open nothing any more.

    What was submitted with it goes on.
    """
    with _broker() as broker, _told():
        broker.revoke_key(key_id)
    click.echo(f"key {key_id} is revoked; {SOON}")


@keys.command()
@click.argument("key_id", metavar="ID", callback=key_id)
@click.option("--grace", callback=span, metavar="TIME", help="The old key works on so long, as 1h; else it is revoked.")
def rotate(key_id: str, grace: timedelta | None) -> None:
    """Make a new key with the limits of another, which it replaces.

    It lasts as long as the other was made for. The key alone is on stdout.
    """
    now = datetime.now(UTC)
    with _broker() as broker, _told():
        made = broker.rotate_key(key_id, grace or timedelta(), at=now)
    _tell(made)
    ends = f"works until {_minute(now + grace)}" if grace else f"is revoked; {SOON}"
    click.echo(f"zfleet: the key {key_id} that it replaces {ends}", err=True)


def _cells(key: KeyView) -> tuple[object, ...]:
    ends = min((end for end in (key.expires_at, key.revoked_at) if end), default=None)
    return (
        key.key_id, key.tenant, key.state, "admin" if key.admin else "tenant", key.priority_max, key.rate,
        key.max_queued, key.max_running, f"{key.share:g}", _minute(key.created_at), _minute(ends),
    )  # fmt: skip


@contextmanager
def _broker() -> Iterator[Broker]:
    from common.broker import Broker
    from common.errors import RedisUnavailable
    from common.settings import load_settings, mask_url

    settings = load_settings()
    broker = Broker(settings)
    try:
        yield broker
    except RedisUnavailable as error:
        raise RedisUnavailable(f"{error.message} (ZFLEET_REDIS_URL is {mask_url(settings.redis_url)})") from error
    finally:
        broker.close()


@contextmanager
def _told() -> Iterator[None]:
    """Tell of a wrong id, or one of a key that cannot be rotated, as of a mistake on the command line."""
    from common.errors import KeyNotActive, UnknownKey

    try:
        yield
    except UnknownKey as error:
        raise click.UsageError(f"{error.message}; `zfleet keys list` shows those there are") from None
    except KeyNotActive as error:
        raise click.UsageError(f"{error.message} with `zfleet keys create`") from None


def _tell(made: MadeKey) -> None:
    click.echo(str(made.token))
    what = f"the {'admin ' if made.key.admin else ''}key {made.key.key_id} of tenant {made.key.tenant}"
    click.echo(f"zfleet: {what}, shown this once; clients take it from ZFLEET_API_KEY", err=True)


def _minute(at: datetime | None) -> str | None:
    return f"{at:%Y-%m-%d %H:%M}Z" if at else None
