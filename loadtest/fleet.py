"""A fleet of simulated workers on this machine, for as long as a test lasts."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.settings import Settings, load_settings
from zfleet.client import Client
from zfleet.interrupts import Interrupts
from zfleet.stack import Stack, StackFailed

MODEL = "simulated"
WORKERS_S = 60.0  # until all of them are there
POLL_S = 0.2


class _Quiet:
    """Hears the stack's news and tells them to nobody unless asked to."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def say(self, text: str) -> None:
        if self._verbose:
            print(text, flush=True)

    def waiting(self, text: str) -> None:
        """Called again and again; the line at the start of a run has said as much."""


def settings(folder: Path, *, workers: int, image_ms: float, log_dir: Path | None = None) -> Settings:
    """Return the settings of a fleet that keeps everything below `folder`."""
    return load_settings(
        {
            "data_dir": folder,
            "log_dir": log_dir,
            "models": (MODEL,),
            "devices": "cpu",
            "workers_per_device": workers,
            "simulated_image_ms": image_ms,
            "host": "127.0.0.1",
            "port": 0,
            "storage": "local",
            "x_accel": "",  # no Nginx here: the gateway sends the pictures
        }
    )


@contextlib.contextmanager
def local_fleet(
    interrupts: Interrupts, *, workers: int, image_ms: float, log_dir: Path, verbose: bool = False
) -> Iterator[str]:
    """Run Redis, the gateway and so many workers in a temporary folder; yields the gateway's URL.

    Whatever ends the block, Ctrl-C included, they are stopped. Raises StackFailed when something does not start.
    """
    with tempfile.TemporaryDirectory(prefix="zfleet-load-") as folder:
        chosen = settings(Path(folder), workers=workers, image_ms=image_ms, log_dir=log_dir)
        with Stack(chosen, _Quiet(verbose), interrupts, embedded=True) as stack:
            _await_workers(stack, workers)
            yield stack.url


def _await_workers(stack: Stack, workers: int) -> None:
    until = time.monotonic() + WORKERS_S
    with Client(stack.url) as client:
        while (there := sum(card.state != "loading" for card in client.workers())) < workers:
            stack.check()
            if time.monotonic() > until:
                raise StackFailed(f"only {there} of {workers} workers came up; logs are in {stack.log_dir}")
            time.sleep(POLL_S)
