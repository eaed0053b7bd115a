"""Work that takes a processor or a disk for long, in native threads: the one that answers everybody goes on meanwhile.

Only under gunicorn's gevent worker, where threads are greenlets of a single native one. Elsewhere it is simply done.
"""

from __future__ import annotations

import functools
import sys
import threading
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
        self._turns = threading.BoundedSemaphore(count)

    def run(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Return what `call` returns, or raise what it raises, and TooBusy when its turn does not come.

        It must not ask for the request that is being served.
        """
        if self._pool is None:
            return call(*args, **named)

        def attempt() -> tuple[T | None, BaseException | None]:
            try:
                return call(*args, **named), None
            except BaseException as error:  # gevent would print what a native thread raises
                return None, error

        if not self._turns.acquire(timeout=self._patience_s):
            raise TooBusy("too many pictures arrive at once; send it again a little later")
        try:
            result, error = self._pool.apply(attempt)
        finally:
            self._turns.release()
        if error is not None:
            raise error
        done: T = result
        return done

    @functools.cached_property
    def _pool(self) -> Any:
        monkey = sys.modules.get("gevent.monkey")
        if monkey is None or not monkey.is_module_patched("threading"):
            return None
        from gevent.threadpool import ThreadPool  # type: ignore[import-untyped]

        return ThreadPool(self._count)


decoding = Threads(2, patience_s=10.0)  # so that no more pile up than are done by then
storing = Threads(8)  # apart, as a storage that hangs must hold up nobody else
