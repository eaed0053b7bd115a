"""Ctrl-C, SIGTERM and SIGHUP, so that no moment is a bad one for them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, the first of these signals raises KeyboardInterrupt in the main thread; further ones never do.

    Inside `held()` it waits until the block is over: a process that was just started is then known to whoever stops it.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._held = 0
        self._waiting = False
        self._count = 0

    @property
    def hurry(self) -> bool:
        """Whether a second signal came: whoever sent it does not want to wait."""
        return self._count > 1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep a signal back until the block is over."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._waiting and not self._held:
                self._waiting = False
                raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it, and a shell's `&`
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            return
        if self._held:
            self._waiting = True
        else:
            raise KeyboardInterrupt
