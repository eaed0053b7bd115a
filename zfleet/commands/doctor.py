"""`zfleet doctor`: is all here that this machine's part of a fleet needs?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from zfleet.commands import options

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "white"}


@click.command()
@click.option(
    "--nginx-config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Have nginx -t look at this.",
)  # fmt: skip
@click.option("--checksums", is_flag=True, help="Compare the checksums of all model files, however long it takes.")
@options.as_json
@options.gateway_url
def doctor(nginx_config: Path | None, checksums: bool, as_json: bool, url: str | None) -> int:
    """Check this machine: Python, GPUs, disk or bucket, Redis, models, gateway.

    A line for each, with the remedy. Exit code 1 when there is a problem; a warning is none.
    """
    from common.settings import load_settings
    from zfleet.doctor import compute, edge, files, folders, storage, store
    from zfleet.doctor.report import Patient, examine

    patient = Patient(settings=load_settings({"url": url}), nginx_config=nginx_config, checksums=checksums)
    checks = {
        "compute": compute.check,
        "storage": storage.check,
        "models": files.models,
        "loras": folders.loras,
        "logs": folders.logs,
        "redis": store.check,
        "gateway": edge.gateway,
        "templates": edge.templates,
        "nginx": edge.nginx,
        "traces": edge.traces,
    }
    found = []
    for finding in examine(patient, checks):
        found.append(finding)
        if not as_json:
            remedy = f" → {finding.remedy}" if finding.remedy else ""
            state = click.style(f"{finding.state:<8}", fg=COLOURS[finding.state])
            click.echo(f"{state} {finding.check}: {finding.says}{remedy}")
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], ensure_ascii=False, indent=2))
    return int(any(one.state == "problem" for one in found))
