"""A worker's pulse: renews its leases, reports progress, and brings back which tasks were canceled or lost.

A lease that could not be renewed for two thirds of its term makes the engine drop the run (see HeldTask.leased_at).
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from common.broker import Broker
from common.cards import WorkerCard
from common.counting import Counting
from common.errors import RedisUnavailable
from common.records import Hold
from common.telemetry import get_logger
from worker.encoding import encode
from worker.held import HeldTask

log = get_logger()

PROGRESS_INTERVAL_S = 0.1  # between two reports; a cancel is seen about this fast
BEATS_PER_RQ_TTL = 10  # RQ forgets a worker that has missed this many
PREVIEW_QUALITY = 60


class Pulse:
    """Runs in a thread of its own with a broker of its own, so that no slow call holds up a lease."""

    def __init__(
        self,
        worker: str,
        broker: Broker,
        *,
        beat_s: float,
        card: Callable[[], WorkerCard],
        held: Callable[[], Sequence[HeldTask]],
        register: Callable[[], None],
        restart: Callable[[], None],
        stuck: Callable[[HeldTask], bool] = lambda _: False,
        counts: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """`card` and `held` are asked at each beat; `register` is called when RQ no longer knows this worker, and
        `restart` when an operator wants it to make room for a fresh one. A task that is `stuck` is not renewed:
        whoever has it in hand makes no progress, though this thread still beats. What `counts` have grown by since the
        last beat is told after it.
        """
        self._worker = worker
        self._broker = broker
        self._beat_s = beat_s
        self._card = card
        self._held = held
        self._register = register
        self._restart = restart
        self._stuck = stuck
        self._counting = Counting(broker, counts)
        self._wake = threading.Event()
        self._stopping = False
        self._due = False
        self._missed = False  # Redis did not answer the last call
        self._reported: dict[Hold, int] = {}
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Beat once, so that the fleet knows the worker, then go on in the background."""
        self._beat()
        self._thread.start()

    def stepped(self) -> None:
        """Say that some run has advanced; cheap."""
        if not self._wake.is_set():  # it is, most of the time, and setting it again costs a step
            self._wake.set()

    def beat_soon(self) -> None:
        """Say that the card has changed in a way that others wait for."""
        self._due = True
        self._wake.set()

    def stop(self) -> None:
        """End the thread; leases are no longer renewed. What was counted of late is told, if Redis is there."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        if not self._missed:
            with contextlib.suppress(RedisUnavailable):
                self._counting.tell()

    def _run(self) -> None:
        next_beat = time.monotonic() + self._beat_s
        while not self._stopping:
            self._wake.wait(max(0.0, next_beat - time.monotonic()))
            self._wake.clear()
            try:
                self._report()
                if self._due or time.monotonic() >= next_beat:
                    self._due = False
                    next_beat = time.monotonic() + self._beat_s
                    self._beat()
                self._missed = False
            except RedisUnavailable as error:
                self._missed = True
                log.warning("pulse_missed", reason=error.message)
            except Exception as error:  # the pulse must not stop while the worker lives
                log.error("pulse_failed", error=type(error).__name__, exc_info=True)
            if not self._stopping:
                time.sleep(PROGRESS_INTERVAL_S)

    def _report(self) -> None:
        tasks = {task.hold: task for task in self._held() if task.outcome is None and task.began is not None}
        self._reported = {hold: step for hold, step in self._reported.items() if hold in tasks}
        news = {
            hold: task
            for hold, task in tasks.items()
            if self._reported.get(hold) != task.steps_done or task.preview is not None
        }
        if not news:
            return
        steps = {hold: (task.steps_done, task.claimed.request.steps) for hold, task in news.items()}
        previews = {hold: preview for hold, task in news.items() if (preview := _take_preview(task))}
        verdicts = self._broker.progress(self._worker, steps, previews)
        for (hold, task), verdict in zip(news.items(), verdicts, strict=True):
            self._reported[hold] = steps[hold][0]
            if verdict != "ok":
                task.verdict = verdict

    def _beat(self) -> None:
        tasks = [task for task in self._held() if not self._stuck(task)]
        ttl_s = max(1, int(self._beat_s * BEATS_PER_RQ_TTL))
        sent = time.monotonic()
        beaten = self._broker.beat(self._card(), [task.hold for task in tasks], ttl_s)
        for task, verdict in zip(tasks, beaten.verdicts, strict=True):
            if verdict != "lost":
                task.leased_at = sent
            if verdict != "ok":
                task.verdict = verdict
        if not beaten.registered:
            self._register()
        self._counting.tell()
        if beaten.restart:
            self._restart()


def _take_preview(task: HeldTask) -> str:
    """Return the task's newest preview as base64 of a WebP file, or '' where there is no new one."""
    pixels, task.preview = task.preview, None
    return "" if pixels is None else base64.b64encode(encode(pixels, "webp", PREVIEW_QUALITY)).decode()
