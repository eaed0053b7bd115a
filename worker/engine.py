"""Which runs advance together, at every denoising step: step-level continuous batching.

The engine knows tasks and pipelines, not queues: other threads offer it tasks and take finished ones off it. Tasks
begin strictly in their order, so that none that needs much memory is overtaken for ever.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from common.errors import DeadlineExceeded, DeviceFailed, FleetError, ModelLoadFailed, OutOfMemory, PipelineFailed
from common.schemas import TaskError
from common.telemetry import get_logger, lines_about
from worker.batches import Batches
from worker.heartbeat import Heartbeat, InHand, Stage
from worker.held import HeldTask, Outcome, Picture, note_step
from worker.loans import Loans, Models
from worker.pipelines.base import ImageRequest
from worker.previewing import show

log = get_logger()

LEAVING_WAIT_S = 0.002


class Engine:
    """Advances the runs of all held tasks. `turn` belongs to one thread; `offer` and `await_room` to any other."""

    def __init__(
        self,
        *,
        models: Models,
        batch_limits: Mapping[str, int],
        retire: Callable[[HeldTask], None],
        stepped: Callable[[], None] = lambda: None,
        run_limits: Mapping[str, float] | None = None,
        fence_after_s: float = math.inf,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """`batch_limits` says for each model how many runs may advance together, `run_limits` how many seconds a
        picture may be in the making; `retire` is given every task that has its outcome, and must not block; `stepped`
        is called after each step. A task whose lease was not renewed for `fence_after_s` is dropped.
        """
        self._models = models
        self._loans = Loans(models)
        self._batches = Batches(models, batch_limits)
        self._retire = retire
        self._stepped = stepped
        self._run_limits = dict(run_limits or {})
        self._fence_after_s = fence_after_s
        self._heartbeat = heartbeat or Heartbeat()
        self._capacity = max(batch_limits.values())
        self._changed = threading.Condition()
        self._inbox: deque[HeldTask] = deque()  # offered, not yet seen by the engine's thread
        self._room = self._capacity
        self._hurry = False
        self._waiting: deque[tuple[HeldTask, int]] = deque()  # pictures not begun
        self._active: list[Picture] = []
        self._held: list[HeldTask] = []  # taken in and without an outcome
        self._leaving: HeldTask | None = None  # one that had to be alone, and is still being stored
        self._blocked = False  # the first in line has to wait for memory
        self._dropped: dict[str, list[InHand]] = {}  # by model: whose pictures were taken off the device in this turn

    @property
    def capacity(self) -> int:
        """Runs that may be active at once."""
        return self._capacity

    def counts(self) -> dict[str, int]:
        """Return how many pictures advanced together, by model, since the start. Any thread may ask."""
        return self._batches.counts()

    @property
    def idle(self) -> bool:
        """Whether nothing is held."""
        with self._changed:
            return not (self._inbox or self._held)

    def offer(self, task: HeldTask) -> None:
        """Hand over a claimed task."""
        with self._changed:
            self._inbox.append(task)
            self._room -= task.claimed.request.n
            if self._loans.lacks(task):
                self._room = 0
            self._changed.notify_all()

    def await_room(self, timeout_s: float) -> int:
        """Return how many more pictures may be claimed, waiting until that is one or more, or the time is up.

        Runs on their last step count as gone, so that the next task is claimed while that step still runs.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._room > 0 or self._hurry, timeout_s)
            return max(0, self._room)

    def hurry(self) -> None:
        """From now on neither `turn` nor `await_room` waits: the worker is draining."""
        self._hurry = True
        with self._changed:
            self._changed.notify_all()

    def turn(self, wait_s: float) -> bool:
        """Take in what was offered, drop what was stopped, advance one batch by a step, retire what is done.

        Waits for work up to `wait_s`; returns whether there was any. Raises DeviceFailed when nothing can be advanced
        any more; what was on the device then is still told by the heartbeat.
        """
        self._take_in(wait_s)
        self._drop_stopped()
        while self._admit():
            self._drop_stopped()  # what was just done may have taken long
        batch = self._batches.next(self._active)
        if batch:
            self._announce_room(batch)
            self._step(batch)
            for picture in batch:
                if picture in self._active:
                    show(picture, self._models.pipeline(picture.model))
            self._stepped()
            for picture in batch:
                if picture.run.done and picture in self._active:
                    self._finish(picture)
        else:
            self._announce_room(())
        self._tidy()
        self._heartbeat.at(Stage.IDLE)
        return bool(batch)

    def release(self, *, begun: bool) -> None:
        """End as `released` every task with no picture begun or, if `begun`, every task held."""
        self._take_in(0)
        for task in tuple(self._held):
            if begun or task.began is None:
                self._end(task, "released")
        self._tidy()
        self._heartbeat.at(Stage.IDLE)

    def abandon(self) -> None:
        """After DeviceFailed: end as `released` every task but those in the call that failed, which are for the
        supervisor to take back. Touches the device no more.
        """
        self._take_in(0)
        suspects = {entry.task_id for entry in self._heartbeat.read().on_device}
        for task in tuple(self._held):
            if task.claimed.task_id not in suspects:
                task.outcome = "released"
                self._held.remove(task)
                self._retire(task)

    def _admit(self) -> bool:
        """Load the model of the first in line, or else begin its picture; return whether there may be more to do."""
        self._blocked = False
        if not self._waiting or len(self._active) >= self._capacity:
            return False
        task, index = self._waiting[0]
        if self._must_wait(task):
            return False
        self._heartbeat.loading([task.in_hand])
        loads = self._loans.lacks(task)
        ready = self._has_model(task) and (loads or self._has_memory(task, index))
        if task.outcome is not None:
            return True  # it could not be begun, and is gone
        self._blocked = not ready
        if ready and not loads:
            self._waiting.popleft()
            self._start(task, index)
        return ready

    def _take_in(self, wait_s: float) -> None:
        with self._changed:
            if not self._held:
                self._changed.wait_for(lambda: bool(self._inbox) or self._hurry, wait_s)
            arrived = list(self._inbox)
            self._inbox.clear()
        for task in arrived:
            self._held.append(task)
            self._waiting.extend((task, index) for index in range(task.claimed.request.n))

    def _must_wait(self, task: HeldTask) -> bool:
        """Whether this task or another has to be alone, until its pictures are stored."""
        if self._leaving:
            if not self._leaving.stored:
                time.sleep(LEAVING_WAIT_S)
                return True
            self._leaving = None
        others = [picture.task for picture in self._active if picture.task is not task]
        return bool(others) and (task.alone or any(other.alone for other in others))

    def _has_model(self, task: HeldTask) -> bool:
        """Whether the task's model is in memory, where it stays until the task leaves; loads it if there is room."""
        began = time.perf_counter()
        try:
            with lines_about(**task.about):
                load_s = self._loans.borrow(task)
        except ModelLoadFailed:  # which has been told; another worker may be able to
            self._end(task, "released")
            return False
        if load_s:
            self._stood_still(load_s)
            task.load_s, task.began = load_s, began
            task.was_at("load", began)
        return load_s is not None

    def _stood_still(self, seconds: float) -> None:
        """Do not count against any picture the time in which the device was at something else."""
        for task in self._held:
            task.fuses = {index: stop_at + seconds for index, stop_at in task.fuses.items()}
            task.began = task.began and task.began + seconds
        for picture in self._active:
            picture.began += seconds

    def _has_memory(self, task: HeldTask, index: int) -> bool:
        """Whether there is memory for this picture beside those that are being made; with none of them it is tried."""
        model = task.claimed.request.model
        try:
            return self._models.fits(model, [*self._made(model), task.image_request(index)]) or not self._active
        except DeviceFailed:
            raise
        except OutOfMemory as error:  # it never fits, not even alone
            self._refuse(task, error)
        except Exception as error:
            self._fail(task, error)
        return False

    def _start(self, task: HeldTask, index: int) -> None:
        model = task.claimed.request.model
        began = time.perf_counter()
        task.began = task.began or began
        if limit_s := self._run_limits.get(model):
            task.fuses[index] = time.monotonic() + limit_s
        self._heartbeat.busy([task.in_hand])
        try:
            run = self._models.pipeline(model).start(task.image_request(index))
        except DeviceFailed:
            raise
        except Exception as error:
            self._fail(task, error)
            return
        task.encode_s += task.was_at("encode", began, index)
        task.runs.append(run)
        task.warnings.extend(w for w in run.warnings if w not in task.warnings)
        self._active.append(Picture(task, index, run, began))

    def _drop_stopped(self) -> None:
        now = time.monotonic()
        for task in tuple(self._held):
            if task.verdict == "lost":
                self._end(task, "lost")
            elif task.verdict == "cancel":
                self._end(task, "canceled")
            elif now - task.leased_at > self._fence_after_s:
                # soon somebody else may run it; until then, as long as nobody does, it is ours to give back
                log.warning("fenced", **task.about)
                self._end(task, "released")
            elif now >= task.stop[0]:
                self._trip(task)

    def _trip(self, task: HeldTask) -> None:
        request, cause = task.claimed.request, task.stop[1]
        if cause == "deadline":
            message = f"not done within its deadline of {request.deadline_s:g} s"
        else:
            limit_s = self._run_limits[request.model]
            message = f"stopped: a picture of model {request.model} may take {limit_s:g} s (its run_limit_s)"
        log.warning("fuse_tripped", **task.about, cause=cause)
        task.fuse = cause
        self._fail(task, DeadlineExceeded(message))

    def _announce_room(self, batch: Sequence[Picture]) -> None:
        leaving = sum(picture.run.step + 1 >= picture.run.request.steps for picture in batch)
        with self._changed:
            offered = sum(task.claimed.request.n for task in self._inbox)
            self._room = self._capacity - len(self._active) - len(self._waiting) - offered + leaving
            if self._blocked or any(task.alone or self._loans.lacks(task) for task in (*self._held, *self._inbox)):
                self._room = 0  # whatever came would stand behind it, while other workers may be free
            if self._room > 0:
                self._changed.notify_all()

    def _step(self, batch: Sequence[Picture]) -> None:
        model = batch[0].model
        pipeline = self._models.pipeline(model)
        self._heartbeat.busy([task.in_hand for task in dict.fromkeys(picture.task for picture in batch)])
        began = time.perf_counter()
        try:
            pipeline.step([picture.run for picture in batch])
            note_step(batch, began)
            return
        except DeviceFailed:
            raise
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].task, error)
                return
            about = [picture.task.claimed.task_id for picture in batch]
            log.warning("step_failed", model=model, batch=len(batch), task_ids=about, error=type(error).__name__)
        # One run may have broken the forward of all: each goes on alone, and only the culprit fails. Not within the
        # handler, where the error would keep alive what the failed forward had put into memory.
        pipeline.release_memory()
        for picture in batch:
            if picture in self._active:
                self._step([picture])

    def _finish(self, picture: Picture) -> None:
        task = picture.task
        pipeline = self._models.pipeline(picture.model)
        began = time.perf_counter()
        self._heartbeat.busy([task.in_hand])
        try:
            task.pixels[picture.index] = pipeline.finish(picture.run)
        except DeviceFailed:
            raise
        except Exception as error:
            self._fail(task, error)
            return
        task.decode_s += task.was_at("decode", began, picture.index)
        task.pictures_s += time.perf_counter() - picture.began
        task.fuses.pop(picture.index, None)
        self._drop([picture])
        if len(task.pixels) == task.claimed.request.n:
            self._end(task, "succeeded")

    def _fail(self, task: HeldTask, error: Exception) -> None:
        if isinstance(error, OutOfMemory) and not task.alone:
            self._again_alone(task)
            return
        if not isinstance(error, FleetError):
            # the exception's own text may quote the prompt, so it goes neither to the client nor into the log
            log.error("pipeline_failed", **task.about, error=type(error).__name__)
            error = PipelineFailed(f"the picture could not be made ({type(error).__name__})")
        self._refuse(task, error)

    def _refuse(self, task: HeldTask, error: FleetError) -> None:
        task.error = TaskError(code=error.code, message=error.message, retryable=error.retryable)
        self._end(task, "failed")

    def _end(self, task: HeldTask, outcome: Outcome) -> None:
        if task.outcome is not None:
            return
        task.outcome = outcome
        task.busy_s = time.perf_counter() - task.began if task.began else 0.0
        self._held.remove(task)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not task)
        self._drop([picture for picture in self._active if picture.task is task])
        self._loans.give_back(task)
        if outcome != "succeeded":
            task.pixels.clear()
        elif task.alone:
            self._leaving = task
        self._retire(task)

    def _again_alone(self, task: HeldTask) -> None:
        """Begin a task anew, once, with the device to itself: what did not fit may have been in a crowd."""
        log.warning("out_of_memory", **task.about, active=len(self._active))
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not task)
        self._drop([picture for picture in self._active if picture.task is task])
        task.alone = True
        task.pictures_s = 0.0
        task.fuses.clear()
        task.pixels.clear()
        task.runs.clear()
        self._waiting.extendleft((task, index) for index in reversed(range(task.claimed.request.n)))

    def _drop(self, pictures: Sequence[Picture]) -> None:
        """Take pictures of one task off the device, which is a call on it like any other."""
        for picture in pictures:
            self._heartbeat.busy([picture.task.in_hand])
            self._active.remove(picture)
            self._models.pipeline(picture.model).discard(picture.run)
            self._dropped.setdefault(picture.model, []).append(picture.task.in_hand)

    def _tidy(self) -> None:
        """Once a turn, if pictures left: have their memory given back, and look at what is still held."""
        left = [model for model in self._dropped if model in self._models.loaded]  # others made room in this very turn
        for model in left:
            self._heartbeat.busy(self._dropped[model])
            pipeline = self._models.pipeline(model)
            pipeline.release_memory()
            self._heartbeat.holds_memory(pipeline.memory_used_mb())
        if left:
            self._models.settle(left[-1], {model: self._made(model) for model in self._models.loaded})
        self._dropped.clear()

    def _made(self, model: str) -> list[ImageRequest]:
        """Return what pictures of a model are being made."""
        return [picture.run.request for picture in self._active if picture.model == model]
