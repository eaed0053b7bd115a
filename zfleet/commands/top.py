"""`zfleet top`: the fleet, live."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from zfleet.commands import options

if TYPE_CHECKING:
    from rich.console import Console

    from common.fleet import Fleet
    from common.history import History
    from zfleet.client import Client
    from zfleet.top import Frame

LONGEST_CALL_S = 3.0
HISTORY_S = 10.0  # the history has a new step this often
ADMIN_WANTED = "top shows everybody's tasks, and so needs a key with the admin scope: zfleet keys create --admin"
QUIT = "q"
KEYS = 64  # read at once; an arrow is three


@click.command()
@click.option("--once", is_flag=True, help="Print one frame, and end.")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, metavar="SECONDS",
    help="Between two looks.",
)  # fmt: skip
@options.gateway_url
def top(once: bool, interval: float, url: str | None) -> None:
    """Show the fleet, live: is it well, what waits, who works on what.

    q or Ctrl-C leaves. Into a pipe it writes a frame at each look. Needs a key with the admin scope.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    console = Console(highlight=False)
    with options.connect(url, timeout_s=LONGEST_CALL_S) as client:
        watch = Watch(client)
        if once:
            console.print(watch.look(patient=False, whole=True))
            return
        with contextlib.suppress(KeyboardInterrupt):
            if console.is_terminal and not console.is_dumb_terminal:
                _live(console, watch, interval)
            else:
                while True:
                    console.print(watch.look(whole=True), "")
                    sys.stdout.flush()
                    time.sleep(interval)


class Watch:
    """Looks at a fleet again and again, and outlives a gateway that is away."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._fleet: Fleet | None = None
        self._history: History | None = None
        self._history_at = 0.0  # time.monotonic() of the next

    def look(self, *, patient: bool = True, whole: bool = False) -> Frame:
        """Return how the fleet is. A key that is not good for this raises ClientError, and so, unless `patient`, does a
        gateway that does not answer.
        """
        from common.errors import ClientError
        from zfleet.top import Frame

        trouble = ""
        try:
            self._fleet = self._client.fleet()
            self._history = self._read_history()
        except ClientError as error:
            if error.code == "forbidden":
                error.message = ADMIN_WANTED
            if not patient or error.code in ("forbidden", "unauthenticated"):
                raise
            trouble = f"{error.message}; trying again"
        return Frame(
            url=self._client.url.rstrip("/"),
            now=datetime.now(UTC),
            fleet=self._fleet,
            history=self._history,
            trouble=trouble,
            whole=whole,
        )

    def _read_history(self) -> History | None:
        from common.errors import ClientError

        if self._history is not None and time.monotonic() < self._history_at:
            return self._history
        self._history_at = time.monotonic() + HISTORY_S
        try:
            return self._client.history()
        except ClientError:  # the rest is worth showing without it
            return self._history


def _live(console: Console, watch: Watch, interval: float) -> None:
    from rich.live import Live

    live = Live(watch.look(), console=console, screen=True, auto_refresh=False)
    with _until_told(), _keys() as pressed:
        try:  # `with live` would not clean up after a Ctrl-C within the first frame
            live.start(refresh=True)
            while QUIT not in pressed(interval):
                live.update(watch.look(), refresh=True)
        finally:
            live.stop()


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """Have SIGTERM end this as Ctrl-C does, so that the terminal is left as it was found."""
    import signal

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits so many seconds for a key, and returns what was typed. Ctrl-C stays what it is."""
    import select
    import termios
    import tty

    listens = [sys.stdin] if sys.stdin.isatty() else []

    def pressed(wait_s: float) -> str:
        ready, _, _ = select.select(listens, [], [], wait_s)
        return os.read(sys.stdin.fileno(), KEYS).decode("ascii", "replace") or QUIT if ready else ""

    if not listens:
        yield pressed
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
