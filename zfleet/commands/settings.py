"""`zfleet settings`: every setting, its value and where that came from."""

from __future__ import annotations

import json

import click

from zfleet.commands import options


@click.command()
@options.as_json
def settings(as_json: bool) -> None:
    """Show every setting and its source."""
    from common.settings import load_settings, sources
    from zfleet.display import table

    rows = sources(load_settings())
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], ensure_ascii=False, indent=2))
    else:
        table(["SETTING", "VALUE", "SOURCE", "DESCRIPTION"], rows)
