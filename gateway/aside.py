"""Work that takes a processor or a disk for long, in native threads: the one that answers everybody goes on meanwhile.

Only under gunicorn's gevent worker, where threads are greenlets of a single native one. Elsewhere it is simply done.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from common.errors import TooBusy

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """So many native threads of this process. What comes beyond them waits, and others are answered."""

    def __init__(self, count: int, patience_s: float | None = None) -> None:
        """`patience_s` is the longest that a call waits for its turn; None: without end."""
        self._count = count
        self._patience_s = patience_s

    def run(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Return what `call` returns, or raise what it raises, and TooBusy when its turn does not come.

        It must not ask for the request that is being served.
        """
        if self._pool is None:
            return call(*args, **named)
        if not self._turns.acquire(timeout=self._patience_s):
            raise TooBusy("too many pictures arrive at once; send it again a little later")
        return self._begun(call, *args, **named)()

    def run_within(self, seconds: float, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Do as `run`, but raise TimeoutError after so many seconds. The thread is lost until the call returns."""
        if self._pool is None:
            return call(*args, **named)
        until = time.monotonic() + seconds
        if not self._turns.acquire(timeout=seconds):
            raise TimeoutError
        return within(until - time.monotonic(), self._begun(call, *args, **named))

    def _begun(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> Callable[[], T]:
        """Let a thread begin, which takes up a turn until it has ended; return what waits for its result."""

        def attempt() -> tuple[T | None, BaseException | None]:
            try:
                return call(*args, **named), None
            except BaseException as error:  # gevent would print what a native thread raises
                return None, error

        done = self._pool.spawn(attempt)
        done.rawlink(lambda _: self._turns.release())

        def result() -> T:
            value, error = done.get()
            if error is not None:
                raise error
            returned: T = value
            return returned

        return result

    @functools.cached_property
    def _turns(self) -> Any:
        # not threading's: it takes a lock of its own, for which the event loop, where turns end, could not wait
        from gevent.lock import BoundedSemaphore  # type: ignore[import-untyped]

        return BoundedSemaphore(self._count)

    @functools.cached_property
    def _pool(self) -> Any:
        if not _under_gevent():
            return None
        from gevent.threadpool import ThreadPool  # type: ignore[import-untyped]

        return ThreadPool(self._count)


def within(seconds: float, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Return what `call` returns, which waits on sockets alone; raises TimeoutError after so many seconds.

    Where threads are native ones nothing ends it.
    """
    if not _under_gevent():
        return call(*args, **named)
    from gevent import Timeout  # type: ignore[import-untyped]

    timeout = Timeout(seconds)  # no Exception, which a library could take for one of its own
    try:
        with timeout:
            return call(*args, **named)
    except Timeout as error:
        if error is not timeout:
            raise
        raise TimeoutError from None


def _under_gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


decoding = Threads(2, patience_s=10.0)  # so that no more pile up than are done by then
