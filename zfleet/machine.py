"""What this machine has for a local stack: a folder of its own, ports, packages, and the commands of its parts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil

from common.errors import ConfigurationError
from common.settings import Settings

# Where the packages are. A child starts in it, so that no `worker/` in the user's folder hides ours.
HOME = Path(__file__).parent.parent
LOOPBACK = "127.0.0.1"
BACKLOG = 2048
LOCK_PATIENCE_S = 1.0  # a stack that is just being stopped may be about to let go
POLL_S = 0.1


def gateway_command() -> list[str]:
    """Return the command that runs the gateway, to be completed by gunicorn options and the application."""
    return [sys.executable, "-m", "gunicorn", "-c", str(HOME / "gateway" / "gunicorn_conf.py")]


def worker_command() -> list[str]:
    """Return the command that runs the workers of this machine."""
    return [sys.executable, "-m", "worker"]


def courier_command() -> list[str]:
    """Return the command that tells webhooks."""
    return [sys.executable, "-m", "gateway.webhooks"]


def require_packages(settings: Settings) -> None:
    """Say which extra to install before anything starts."""
    wanted = {"gateway": ["gunicorn", "gevent", "flask"], "worker": ["numpy", "PIL"]}
    if any(spec.pipeline != "simulated" for spec in settings.catalogue().values()):
        wanted["worker"] += ["torch", "diffusers"]
    for extra, modules in wanted.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigurationError(f"{missing[0]} is not installed: pip install 'zfleet[{extra}]'")


def require_templates(settings: Settings) -> None:
    """Raise ConfigurationError for a prompt template with a mistake in it, as the gateway would."""
    from gateway import templates

    templates.load(settings)


def lock(data_dir: Path, waiting: Callable[[str], None]) -> IO[str]:
    """Return the data directory's lock, held; raises ConfigurationError when another stack has it.

    `waiting` is told why this takes long. Whoever holds the lock writes its process id and URL into the file.
    """
    path = data_dir / "stack.lock"
    file = path.open("a+")
    until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid, _, url = file.read().strip().partition(" ")
            if pid.isdigit() and not psutil.pid_exists(int(pid)):  # its guardian lets go when the last child is gone
                waiting("the stack that was killed here is still stopping")
            elif time.monotonic() > until:
                file.close()
                whose = f"process {pid}, at {url}," if url else "another stack"
                remedy = "stop it or set another ZFLEET_DATA_DIR"
                raise ConfigurationError(f"{whose} already uses {data_dir}; {remedy}") from None
            time.sleep(POLL_S)
            continue
        return file


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, on a free port where this one is taken; raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        try:
            return socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return socket.create_server((host, 0), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def free_port(wanted: int) -> int:
    """Return `wanted` if nobody listens on it, else a port of loopback that is free now."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)) as probe:
            return int(probe.getsockname()[1])
    raise ConfigurationError(f"no free port on {LOOPBACK}")
