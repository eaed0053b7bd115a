"""From pixels to a visible result, off the GPU's path: encode, store, tell Redis. Results wait while Redis is away."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from common.broker import FOREVER, Broker
from common.errors import FleetError
from common.schemas import ImageRef, StageTimings, TaskError
from common.storage.base import BaseStorage
from common.telemetry import get_logger
from worker.encoding import encode
from worker.held import HeldTask

log = get_logger()

THREADS = 2
STORE_TRIES = 3
STORE_WAIT_S = 0.5


class Committer:
    """Ends tasks in the background. `committed` is called for each one, whatever became of it."""

    def __init__(
        self, worker: str, broker: Broker, storage: BaseStorage, *, committed: Callable[[HeldTask], None]
    ) -> None:
        self._worker = worker
        self._broker = broker
        self._storage = storage
        self._committed = committed
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="commit")
        self._abandon_at = FOREVER  # on time.monotonic's clock
        self._storing: dict[int, float] = {}  # task at a thread -> since when

    def commit(self, task: HeldTask) -> None:
        """Take over a task that has its outcome; returns at once."""
        self._threads.submit(self._run, task)

    def standing_s(self) -> float:
        """Return how long the slowest of the writes under way has been going on; 0 without any."""
        return time.monotonic() - min(tuple(self._storing.values()), default=math.inf) if self._storing else 0.0

    def close(self, *, abandon_after_s: float = FOREVER) -> None:
        """Wait until everything taken over is committed, but no longer than this for a Redis that is away."""
        self._abandon_at = time.monotonic() + abandon_after_s
        self._threads.shutdown(wait=True)

    def _run(self, task: HeldTask) -> None:
        try:
            if task.outcome == "released":
                self._broker.release(self._worker, task.hold, patience_s=FOREVER, give_up=self._abandoned)
            elif task.outcome in ("succeeded", "failed", "canceled"):
                self._finish(task)
            log.info(
                "task_left",
                task_id=task.claimed.task_id,
                request_id=task.claimed.request_id,
                model=task.claimed.request.model,
                outcome=task.outcome,
                code=task.error.code if task.error else None,
                duration_ms=round(task.busy_s * 1000, 1),
            )
        except Exception as error:
            # The lease runs out and the supervisor takes the task back, so nothing is lost.
            log.error("commit_failed", task_id=task.claimed.task_id, error=type(error).__name__)
        finally:
            task.pixels.clear()
            self._committed(task)

    def _abandoned(self) -> bool:
        return time.monotonic() >= self._abandon_at

    def _finish(self, task: HeldTask) -> None:
        images: Sequence[ImageRef] = ()
        began = time.perf_counter()
        if task.outcome == "succeeded":
            self._storing[id(task)] = time.monotonic()
            try:
                images = self._store(task)
            except FleetError as error:
                task.outcome = "failed"
                task.error = TaskError(code=error.code, message=error.message, retryable=error.retryable)
            except Exception as error:  # the encoder's; running the task again would end the same way
                log.error("encode_failed", task_id=task.claimed.task_id, error=type(error).__name__)
                task.outcome = "failed"
                message = f"the picture could not be written as {task.claimed.request.format} ({type(error).__name__})"
                task.error = TaskError(code="encode_failed", message=message)
            finally:
                del self._storing[id(task)]
        status = task.outcome
        assert status == "succeeded" or status == "failed" or status == "canceled"
        stages = StageTimings(
            encode_ms=_ms(task.encode_s),
            denoise_ms=_ms(task.denoise_s),
            decode_ms=_ms(task.decode_s),
            store_ms=_ms(time.perf_counter() - began),
        )
        verdict = self._broker.finish(
            self._worker,
            task.hold,
            status,
            images=images,
            error=task.error,
            warnings=task.warnings,
            stages=stages,
            busy_ms=task.busy_s * 1000,
            patience_s=FOREVER,
            give_up=self._abandoned,
        )
        if verdict == "lost":
            task.outcome = "lost"
            for image in images:
                self._storage.delete(image.key)

    def _store(self, task: HeldTask) -> list[ImageRef]:
        request = task.claimed.request
        # The worker's own folder: no two workers, nor two attempts, can ever write the same file.
        folder = f"{datetime.now(UTC):%Y%m%d}/{self._worker}/{task.claimed.task_id}"
        images = []
        for index in sorted(task.pixels):
            pixels = task.pixels[index]
            data = encode(pixels, request.format, request.quality)
            key = f"{folder}/{index}.{request.format}"
            self._put(key, data)
            images.append(
                ImageRef(
                    key=key,
                    width=pixels.shape[1],
                    height=pixels.shape[0],
                    format=request.format,
                    bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    seed=request.seed + index,
                )
            )
        return images

    def _put(self, key: str, data: bytes) -> None:
        for tried in range(1, STORE_TRIES + 1):
            try:
                self._storage.put(key, data)
                return
            except FleetError:
                if tried == STORE_TRIES:
                    raise
                time.sleep(STORE_WAIT_S * tried)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
