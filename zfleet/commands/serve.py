"""`zfleet gateway`, `worker` and `webhooks`: one part of the fleet, in the foreground; `alive`: whether it is well."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from common.settings import Settings


@click.command()
@click.option("--host", help="Listen here; else ZFLEET_HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen here; else ZFLEET_PORT.")
@options.insecure
def gateway(host: str | None, port: int | None, insecure: bool | None) -> None:
    """Run the gateway (gunicorn), in the foreground.

    Beyond loopback it listens only once there are API keys; see `zfleet keys`.
    """
    flags = {"host": host, "port": port, "insecure": insecure}
    settings = _settings(flags, extra="gateway", module="gunicorn")
    from zfleet.machine import gateway_command, require_templates

    require_templates(settings)  # a mistake is told here, in one line
    _become([*gateway_command(), "gateway.wsgi:app"], settings)


@click.command()
@click.option("--devices", help="GPUs by index, as 0,1; or all; or cpu. Else ZFLEET_DEVICES.")
@click.option("--models", help="Aliases, as turbo,base; else ZFLEET_MODELS.")
def worker(devices: str | None, models: str | None) -> None:
    """Run this machine's workers, in the foreground.

    One process per GPU. SIGTERM drains them: what runs is finished, or given back.
    """
    settings = _settings({"devices": devices, "models": models}, extra="worker", module="numpy")
    from zfleet.machine import worker_command

    _become(worker_command(), settings)


@click.command()
def webhooks() -> None:
    """Tell webhooks of their tasks, in the foreground.

    Any number of these may run side by side, anywhere.
    """
    settings = _settings({}, extra="gateway", module="standardwebhooks")
    from zfleet.machine import courier_command

    _become(courier_command(), settings)


@click.command()
@click.option("--ready", is_flag=True, help="Whether it does its work by now, and does not only start.")
def alive(ready: bool) -> None:
    """Tell whether the part that runs here is well, for a container's probe.

    It looks at ZFLEET_ALIVE_FILE, which that part has to be given too; exit code 1 says no.
    """
    from common.errors import ConfigurationError, FleetError
    from common.servicemanager import READY, STALE_S, sign_of_life
    from common.settings import load_settings

    file = load_settings().alive_file
    if file is None:
        raise ConfigurationError("ZFLEET_ALIVE_FILE is not set; give a file to the part and to this command")
    try:
        age_s, said = sign_of_life(file)
    except OSError as error:
        raise FleetError(f"no sign of life in {file}: {error.strerror}") from None
    if age_s > STALE_S:
        raise FleetError(f"the last sign of life was {age_s:.0f} s ago: {said}")
    if ready and not said.startswith(READY):
        raise FleetError(said)
    click.echo(said)


def _settings(flags: Mapping[str, Any], *, extra: str, module: str) -> Settings:
    from common.errors import ConfigurationError
    from common.settings import load_settings

    settings = load_settings(flags)
    settings.catalogue()  # a wrong model name is told here, in one line
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(f"{module} is not installed: pip install 'zfleet[{extra}]'")
    return settings


def _become(command: list[str], settings: Settings) -> None:
    """Go on as this program, under the same process id: signals and exit codes are then its own."""
    from common.settings import child_environment, take_service_manager
    from zfleet.machine import HOME

    environment = child_environment(settings, **take_service_manager())  # it is the same process to systemd
    os.chdir(HOME)  # `python -m` looks into the working directory first
    os.execve(command[0], command, environment)
