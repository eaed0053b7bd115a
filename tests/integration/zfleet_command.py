"""The `zfleet` command as a user runs it, for test_cli.py and test_stack.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.servers import Server, eventually, free_port
from zfleet.client import Client

ROOT = Path(__file__).parents[2]
UP_WITHIN_S = 60.0
GONE_WITHIN_S = 20.0


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these ZFLEET_ settings and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ZFLEET_")}
    return kept | {f"ZFLEET_{name.upper()}": str(value) for name, value in settings.items()}


def zfleet(
    *args: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    command = [sys.executable, "-m", "zfleet", *args]
    done = subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Up(Server):
    """`zfleet up` with the simulated model, in a folder of its own."""

    def __init__(self, folder: Path, *flags: str, **settings: object) -> None:
        self.folder = folder
        self.port = free_port()
        self._said_before = 0
        folder.mkdir(parents=True, exist_ok=True)
        given = {
            "data_dir": folder / "data",
            "port": self.port,
            "simulated_image_ms": 100,
            "drain_s": 5,
            "beat_s": 0.5,
        } | settings
        command = [sys.executable, "-m", "zfleet", "up", "--model", "simulated", *flags]
        super().__init__(command, env=environment(**given), log=folder / "up.log")

    def start(self) -> Self:
        self._said_before = self._log_size()
        super().start()
        eventually(lambda: "zfleet is up" in self.said() or not self.alive, within_s=UP_WITHIN_S)
        if not self.alive:
            pytest.fail(f"zfleet up did not come up:\n{self.said()}")
        return self

    def said(self) -> str:
        """What it has told since it was started."""
        return (self.folder / "up.log").read_bytes()[self._said_before :].decode() if self._log_size() else ""

    def _log_size(self) -> int:
        log = self.folder / "up.log"
        return log.stat().st_size if log.exists() else 0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def url(self) -> str:
        """Where it says that its API is."""
        return self._after("API")

    @property
    def redis_url(self) -> str:
        return self._after("Redis")

    def client(self) -> Client:
        return Client(self.url)

    def family(self) -> list[psutil.Process]:
        """Every process that it started, and that those started."""
        return psutil.Process(self.pid).children(recursive=True)

    def member(self, mark: str) -> psutil.Process:
        """The one child of its own whose command line has this in it."""
        found: list[psutil.Process] = []

        def find() -> bool:
            found[:] = [c for c in psutil.Process(self.pid).children() if mark in " ".join(c.cmdline())]
            return len(found) == 1

        eventually(find)
        return found[0]

    def _after(self, word: str) -> str:
        line = next(line for line in self.said().splitlines() if line.strip().startswith(word + " "))
        return line.split()[1]


def assert_gone(processes: list[psutil.Process], within_s: float = GONE_WITHIN_S) -> None:
    """Fail if any of these processes still lives, and end it."""
    alive = psutil.wait_procs(processes, timeout=within_s)[1]
    left = [(process.pid, process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert left == []
