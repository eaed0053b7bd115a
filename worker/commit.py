"""From pixels to a visible result, off the GPU's path: encode, store, tell Redis. Results wait while Redis is away."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from common.broker import Broker
from common.connection import FOREVER
from common.errors import FleetError, StorageError, StorageFull
from common.schemas import ImageRef, StageTimings, TaskError
from common.storage.base import BaseStorage, attempt_folder
from common.telemetry import get_logger
from worker.encoding import encode
from worker.heartbeat import Heartbeat
from worker.held import HeldTask

log = get_logger()

THREADS = 2
STORE_TRIES = 5  # for want of room; housekeeping may make some
# A storage that fails is tried again for so long. Finished pictures are worth that, and the backlog of those that wait
# keeps the worker from claiming more.
OUTAGE_S = 60.0
STORE_WAIT_S = 0.5  # between the first two; doubles from there
STORE_LONGEST_WAIT_S = 8.0


class Committer:
    """Ends tasks in the background. `committed` is called for each one, whatever became of it."""

    def __init__(
        self,
        worker: str,
        broker: Broker,
        storage: BaseStorage,
        *,
        committed: Callable[[HeldTask], None],
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._worker = worker
        self._broker = broker
        self._storage = storage
        self._committed = committed
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="commit")
        self._closing = threading.Event()
        self._abandon_at = FOREVER  # on time.monotonic's clock
        self._heartbeat = heartbeat or Heartbeat()
        self._storing: dict[HeldTask | None, float] = {}  # since when, on the same clock
        self._failing = False  # the last write did
        self._lock = threading.Lock()  # of that

    def commit(self, task: HeldTask) -> None:
        """Take over a task that has its outcome; returns at once."""
        self._threads.submit(self._run, task)

    @contextlib.contextmanager
    def reading(self, task: HeldTask | None) -> Iterator[Callable[[], None]]:
        """Watch what is read for a task, or for none, as writes are watched: for whether it stands still.

        What it yields is to be called before each further read.
        """
        self._note(task, began=True)
        try:
            yield functools.partial(self._note, task, began=True)
        finally:
            self._note(task, began=False)

    def standing_s(self) -> float:
        """Return how long the slowest of the writes and reads under way has been going on; 0 without any."""
        with self._lock:
            return time.monotonic() - min(self._storing.values()) if self._storing else 0.0

    def close(self, *, abandon_after_s: float = FOREVER) -> None:
        """Wait until everything taken over is committed, but no longer than this for Redis or the disk to be back."""
        self._abandon_at = time.monotonic() + abandon_after_s
        self._closing.set()
        self._threads.shutdown(wait=True)

    def _run(self, task: HeldTask) -> None:
        try:
            began = time.perf_counter()
            images, left, store_s = list[ImageRef](), list[str](), 0.0
            if task.outcome == "succeeded":
                images, left = self._store(task)
                store_s = task.was_at("store", began)
            stages, began = _stages(task, store_s), time.perf_counter()
            if task.outcome == "released":
                self._broker.release(self._worker, task.hold, give_up=self._abandoned)
            elif task.outcome in ("succeeded", "failed", "canceled"):
                self._finish(task, images, stages)
            task.was_at("finish", began)
            log.info(
                "attempt_ended",
                **task.about,
                model=task.claimed.request.model,
                outcome=task.outcome,
                code=task.error.code if task.error else None,
                images=len(images),
                duration_ms=round(task.busy_s * 1000, 1),
                **stages.model_dump(),
            )
            if task.trace is not None and task.outcome != "lost":  # then whoever took it back has told
                task.trace.tell(task, self._worker, stages)
            self._discard(left)  # last, for the storage may hang
        except Exception as error:
            # The lease runs out and the supervisor takes the task back, so nothing is lost.
            log.error("commit_failed", **task.about, error=type(error).__name__)
        finally:
            task.pixels.clear()
            self._committed(task)

    def _finish(self, task: HeldTask, images: Sequence[ImageRef], stages: StageTimings) -> None:
        status = task.outcome
        assert status == "succeeded" or status == "failed" or status == "canceled"
        verdict = self._broker.finish(
            self._worker,
            task.hold,
            status,
            images=images,
            error=task.error,
            warnings=task.warnings,
            stages=stages,
            busy_ms=(task.busy_s - task.load_s) * 1000,
            picture_ms=task.pictures_s * 1000 / task.claimed.request.n,  # what the next one may take
            fuse=task.fuse or "",
            give_up=self._abandoned,
        )
        if verdict == "lost":
            task.outcome = "lost"
            self._discard(image.key for image in images)

    def _store(self, task: HeldTask) -> tuple[list[ImageRef], list[str]]:
        """Return the stored pictures: all of them or, when one fails, none, and the task's outcome is another then.

        Beside them, in that case, the keys of what may have been stored for nothing.
        """
        request = task.claimed.request
        folder = attempt_folder(self._worker, *task.hold, datetime.now(UTC).date())
        keys = {index: f"{folder}/{index}.{request.format}" for index in sorted(task.pixels)}
        try:
            return [self._put(task, index, key) for index, key in keys.items()], []
        except FleetError as error:
            if self._abandoned():  # not all tries were made: another worker has the time
                task.outcome = "released"
            else:
                task.outcome = "failed"
                task.error = TaskError(code=error.code, message=error.message, retryable=error.retryable)
        except Exception as error:  # the encoder's; running the task again would end the same way
            log.error("encode_failed", **task.about, error=type(error).__name__)
            task.outcome = "failed"
            message = f"the picture could not be written as {request.format} ({type(error).__name__})"
            task.error = TaskError(code="encode_failed", message=message)
        finally:
            self._note(task, began=False)
            task.stored = True
        return [], list(keys.values())

    def _note(self, task: HeldTask | None, *, began: bool) -> None:
        """Let the supervisor know who is at fault should an encoder take the process down, and the pulse who hangs."""
        with self._lock:
            if began:
                self._storing[task] = time.monotonic()
            else:
                self._storing.pop(task, None)
            oldest = min(self._storing.values(), default=math.inf)
            self._heartbeat.storing([storing.in_hand for storing in self._storing if storing], oldest)

    def _put(self, task: HeldTask, index: int, key: str) -> ImageRef:
        request, pixels = task.claimed.request, task.pixels[index]
        self._note(task, began=True)
        data = encode(pixels, request.format, request.quality)
        began = time.monotonic()
        for tries in itertools.count(1):
            if self._failing and self._abandoned():
                raise StorageError("the storage fails, and this worker has to leave")
            self._note(task, began=True)
            try:
                self._storage.put(key, data)
                self._failing = False
                break
            except FleetError as error:
                self._failing = True
                log.warning("store_failed", **task.about, code=error.code, tries=tries)
                full, waited_s = isinstance(error, StorageFull), time.monotonic() - began
                if tries == STORE_TRIES if full else waited_s >= OUTAGE_S:
                    raise
                if not self._rest(min(STORE_WAIT_S * 2 ** (tries - 1), STORE_LONGEST_WAIT_S)):
                    raise
        return ImageRef(
            key=key,
            width=pixels.shape[1],
            height=pixels.shape[0],
            format=request.format,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=request.seed + index,
        )

    def _discard(self, keys: Iterable[str]) -> None:
        with contextlib.suppress(FleetError):  # a sweep will find them
            for key in keys:
                self._storage.delete(key)

    def _rest(self, seconds: float) -> bool:
        """Wait, though no longer than there is time for; return whether there is time for more."""
        until = time.monotonic() + seconds
        self._closing.wait(seconds)
        time.sleep(max(0.0, min(until, self._abandon_at) - time.monotonic()))
        return not self._abandoned()

    def _abandoned(self) -> bool:
        return time.monotonic() >= self._abandon_at


def _stages(task: HeldTask, store_s: float) -> StageTimings:
    return StageTimings(
        load_ms=_ms(task.load_s),
        encode_ms=_ms(task.encode_s),
        denoise_ms=_ms(task.denoise_s),
        decode_ms=_ms(task.decode_s),
        store_ms=_ms(store_s),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
