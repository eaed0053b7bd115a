"""A call that is taken step by step: it has a thread of its own, and stands still in it until it is let go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised within a call at the end of its step, to end it. No Exception, so that the call does not catch it."""


class Stepwise(Generic[T]):
    """A function's call, advanced by another thread. Only ever one of the two runs: each waits while the other does."""

    def __init__(self, function: Callable[[Callable[[], None]], T]) -> None:
        """`function` is given another function, `pause`, to call at the end of each of its steps.

        Its thread is a daemon, so that a call that stands still keeps no process from ending.
        """
        self._function: Callable[[Callable[[], None]], T] | None = function
        self._thread: threading.Thread | None = None
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._pausing = True
        self._stopping = False
        self._ended = False
        self._results: list[T] = []
        self._error: BaseException | None = None

    def advance(self) -> bool:
        """Let the call go on until it pauses or ends; return whether it has ended. Raises what the call raised."""
        if not self._ended:
            self._resume()
        if self._error is not None:
            raise self._error
        return self._ended

    def complete(self) -> T:
        """Let the call go on to its end, without further pauses; return its result. Raises what the call raised."""
        self._pausing = False
        self.advance()
        return self._results[0]

    def stop(self) -> None:
        """End the call at its pause and drop what it holds, its result too. Safe at any time, and twice."""
        self._stopping = True
        if self._thread is not None and not self._ended:
            self._resume()
            self._thread.join()
        self._ended = True
        self._function = self._error = None
        self._results.clear()

    def _resume(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stepwise", daemon=True)
            self._thread.start()
        else:
            self._go.release()
        try:
            self._back.acquire()
        except (
            BaseException
        ):  # from a signal's handler: the call is now running beside us, but no further than its pause
            self._stopping = True
            raise
        if self._ended:
            self._thread.join()

    def _run(self) -> None:
        try:
            assert self._function is not None
            self._results.append(self._function(self._pause))
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._function = None
            self._ended = True
            self._back.release()

    def _pause(self) -> None:
        if self._pausing and not self._stopping:
            self._back.release()
            self._go.acquire()
        if self._stopping:
            raise Stopped
