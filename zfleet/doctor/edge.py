"""The gateway as this machine reaches it, its templates, Nginx' configuration, and the collector of traces."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

import requests

from common.errors import ClientError
from common.settings import traces_wanted
from zfleet.client import Client
from zfleet.doctor.report import Finding, Patient, State
from zfleet.doctor.store import clock

CALL_S = 5.0
NGINX_S = 10.0
DATE_STEP_S = 1.0  # the header tells whole seconds


def gateway(patient: Patient) -> Iterator[Finding]:
    """Look at the gateway of ZFLEET_URL, its health and what the API key is good for there."""
    settings = patient.settings
    key = settings.api_key.get_secret_value() if settings.api_key else None
    with Client(settings.url, api_key=key, timeout_s=CALL_S) as client:
        try:
            health = client.health()
        except ClientError as error:
            named = "url" in settings.model_fields_set
            remedy = "start it, or correct ZFLEET_URL" if named else "set ZFLEET_URL to where the gateway is"
            yield Finding("gateway", "problem" if named else "warning", error.message, remedy)
            return
        says = f"{settings.url} is {health.status}, {health.workers} workers"
        if health.status == "healthy":
            yield Finding("gateway", "ok", says)
        else:
            state: State = "warning" if health.status == "degraded" else "problem"
            yield Finding("gateway", state, f"{says}: {'; '.join(health.reasons)}", "see `zfleet top`")
        yield _key(client)
    yield _date(settings.url)


def templates(patient: Patient) -> Iterator[Finding]:
    """Look at the prompt templates."""
    if importlib.util.find_spec("flask") is None:
        yield Finding("templates", "skipped", "the gateway reads them, and flask is not installed here")
        return
    from gateway import templates

    yield Finding("templates", "ok", f"{len(templates.load(patient.settings))} templates are well-formed")


def nginx(patient: Patient) -> Iterator[Finding]:
    """Have Nginx look at the configuration that is named."""
    program, config = shutil.which("nginx"), patient.nginx_config
    if config is None:
        yield Finding("nginx", "skipped", "no configuration is named; give --nginx-config FILE")
        return
    if program is None:
        yield Finding("nginx", "skipped", "nginx is not on PATH; check where it runs")
        return
    command = [program, "-t", "-q", "-c", str(config.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=NGINX_S, check=False)
    said = [line for line in done.stderr.strip().splitlines() if "[emerg]" in line] or done.stderr.strip().splitlines()
    if done.returncode == 0:
        yield Finding("nginx", "ok", f"{config} passes nginx -t")
    elif said and "Permission denied" in said[-1]:
        yield Finding("nginx", "skipped", f"only its owner may check it: {said[-1]}")
    else:
        yield Finding(
            "nginx", "problem", said[-1] if said else "nginx -t failed", "render it anew: deploy/nginx/render.py"
        )


def traces(_patient: Patient) -> Iterator[Finding]:
    """Look at the collector of traces, if OpenTelemetry's variables name one."""
    if not traces_wanted():
        yield Finding("traces", "skipped", "no OTEL_ variable asks for them")
        return
    try:
        from common import spans
    except ImportError:
        yield Finding("traces", "problem", "OpenTelemetry is not installed", "pip install 'zfleet[tracing]'")
        return
    if spans.collector_answers():
        yield Finding("traces", "ok", "the collector takes them")
    else:
        remedy = "see OTEL_EXPORTER_OTLP_ENDPOINT; until then they are dropped, and nobody waits"
        yield Finding("traces", "warning", "the collector does not take them", remedy)


def _key(client: Client) -> Finding:
    try:
        client.queue()
    except ClientError as error:
        return Finding("api key", "problem", error.message)
    return Finding("api key", "ok", "the gateway takes it, or wants none")


def _date(url: str) -> Finding:
    """Compare the gateway's Date header with this machine's clock."""
    before = time.time()
    try:
        header = requests.get(urljoin(url.rstrip("/") + "/", "health"), timeout=CALL_S).headers.get("Date", "")
    except requests.RequestException as error:
        return Finding("gateway clock", "skipped", f"it did not tell the time: {error}")
    return dated(header, (before + time.time()) / 2)


def dated(header: str, now: float) -> Finding:
    """Judge a Date header of this moment."""
    try:
        ahead_s = parsedate_to_datetime(header).timestamp() + DATE_STEP_S / 2 - now
    except ValueError:
        return Finding("gateway clock", "skipped", "it did not tell the time")
    return clock("gateway clock", 0.0 if abs(ahead_s) <= DATE_STEP_S else ahead_s)
