"""Which runs advance together, at every denoising step: step-level continuous batching.

The engine knows tasks and pipelines, not queues: other threads offer it tasks and take finished ones off it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import DeadlineExceeded, FleetError, PipelineFailed
from common.records import Claimed, Hold, Verdict
from common.schemas import TaskError
from common.telemetry import get_logger
from worker.pipelines.base import BasePipeline, ImageRequest, Run

log = get_logger()

Outcome = Literal["succeeded", "failed", "canceled", "released", "lost"]


@dataclass(eq=False, kw_only=True)
class HeldTask:
    """A task this worker holds, from the claim to the commit."""

    claimed: Claimed
    deadline: float | None  # on time.monotonic's clock
    verdict: Verdict = "ok"  # set by the thread that talks to Redis; obeyed at the next step
    outcome: Outcome | None = None
    error: TaskError | None = None
    pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # by picture, (height, width, 3)
    warnings: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # of the pictures begun; what they held on the device may be gone
    began: float | None = None  # time.perf_counter when its first picture was started
    encode_s: float = 0.0
    decode_s: float = 0.0
    busy_s: float = 0.0  # from `began` to its outcome

    @property
    def hold(self) -> Hold:
        return Hold(self.claimed.task_id, self.claimed.fence)

    @property
    def steps_done(self) -> int:
        """Steps that its slowest picture has done."""
        if len(self.runs) < self.claimed.request.n:
            return 0
        return min(run.step for run in self.runs)

    @property
    def denoise_s(self) -> float:
        """Seconds it was busy with neither encoding nor decoding."""
        return max(0.0, self.busy_s - self.encode_s - self.decode_s)


@dataclass(eq=False)
class Picture:
    """One of a task's pictures while its run advances."""

    task: HeldTask
    index: int
    run: Run


class Engine:
    """Advances the runs of all held tasks. `turn` belongs to one thread; `offer` and `await_room` to any other."""

    def __init__(
        self,
        *,
        pipeline: Callable[[str], BasePipeline],
        batch_limits: Mapping[str, int],
        retire: Callable[[HeldTask], None],
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        """`batch_limits` says for each model how many runs may advance together; `retire` is given every task that has
        its outcome, and must not block; `stepped` is called after each step.
        """
        self._pipeline = pipeline
        self._limits = dict(batch_limits)
        self._retire = retire
        self._stepped = stepped
        self._capacity = max(self._limits.values())
        self._changed = threading.Condition()
        self._inbox: deque[HeldTask] = deque()  # offered, not yet seen by the engine's thread
        self._room = self._capacity
        self._hurry = False
        self._waiting: deque[tuple[HeldTask, int]] = deque()  # pictures not begun
        self._active: list[Picture] = []
        self._held: list[HeldTask] = []  # taken in and without an outcome
        self._last_model = ""

    @property
    def capacity(self) -> int:
        """Runs that may be active at once."""
        return self._capacity

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

        Waits for work up to `wait_s`; returns whether there was any.
        """
        self._admit(wait_s)
        self._drop_stopped()
        batch = self._next_batch()
        if not batch:
            self._announce_room(())
            return False
        self._announce_room(batch)
        self._step(batch)
        self._stepped()
        for picture in batch:
            if picture.run.done and picture.task.outcome is None:
                self._finish(picture)
        return True

    def release(self, *, begun: bool) -> None:
        """End as `released` every task with no picture begun or, if `begun`, every task held."""
        self._admit(0)
        for task in tuple(self._held):
            if begun or task.began is None:
                self._end(task, "released")

    def _admit(self, wait_s: float) -> None:
        if self._held and not self._inbox and not self._waiting:
            return  # the usual case between two steps
        with self._changed:
            if not self._held:
                self._changed.wait_for(lambda: bool(self._inbox) or self._hurry, wait_s)
            arrived = list(self._inbox)
            self._inbox.clear()
        for task in arrived:
            self._held.append(task)
            self._waiting.extend((task, index) for index in range(task.claimed.request.n))
        while self._waiting and len(self._active) < self._capacity:
            task, index = self._waiting.popleft()
            if task.outcome is None:
                self._start(task, index)

    def _start(self, task: HeldTask, index: int) -> None:
        request = task.claimed.request
        began = time.perf_counter()
        task.began = task.began or began
        try:
            run = self._pipeline(request.model).start(
                ImageRequest(
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt,
                    width=request.width,
                    height=request.height,
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    seed=request.seed + index,
                )
            )
        except Exception as error:
            self._fail(task, error)
            return
        task.encode_s += time.perf_counter() - began
        task.runs.append(run)
        task.warnings.extend(w for w in run.warnings if w not in task.warnings)
        self._active.append(Picture(task, index, run))

    def _drop_stopped(self) -> None:
        now = time.monotonic()
        for task in tuple(self._held):
            if task.verdict == "lost":
                self._end(task, "lost")
            elif task.verdict == "cancel":
                self._end(task, "canceled")
            elif task.deadline is not None and now >= task.deadline:
                limit = task.claimed.request.deadline_s
                self._fail(task, DeadlineExceeded(f"not done within its deadline of {limit:g} s"))

    def _next_batch(self) -> list[Picture]:
        """The runs of one model, up to its limit; models with active runs take turns."""
        if len(self._limits) == 1:
            (self._last_model,) = self._limits
            return self._active[: self._capacity]
        models = sorted({picture.task.claimed.request.model for picture in self._active})
        if not models:
            return []
        after = [model for model in models if model > self._last_model]
        self._last_model = (after or models)[0]
        batch = [picture for picture in self._active if picture.task.claimed.request.model == self._last_model]
        return batch[: self._limits[self._last_model]]

    def _announce_room(self, batch: Sequence[Picture]) -> None:
        leaving = sum(picture.run.step + 1 >= picture.run.request.steps for picture in batch)
        with self._changed:
            offered = sum(task.claimed.request.n for task in self._inbox)
            self._room = self._capacity - len(self._active) - len(self._waiting) - offered + leaving
            if self._room > 0:
                self._changed.notify_all()

    def _step(self, batch: Sequence[Picture]) -> None:
        pipeline = self._pipeline(self._last_model)
        try:
            pipeline.step([picture.run for picture in batch])
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].task, error)
                return
            # One run may have broken the forward of all: each goes on alone, and only the culprit fails.
            log.warning("step_failed", model=self._last_model, batch=len(batch), error=type(error).__name__)
            pipeline.release_memory()
            for picture in batch:
                if picture.task.outcome is None:
                    self._step([picture])

    def _finish(self, picture: Picture) -> None:
        task = picture.task
        pipeline = self._pipeline(task.claimed.request.model)
        began = time.perf_counter()
        try:
            task.pixels[picture.index] = pipeline.finish(picture.run)
        except Exception as error:
            self._fail(task, error)
            return
        task.decode_s += time.perf_counter() - began
        self._active.remove(picture)
        pipeline.discard(picture.run)
        pipeline.release_memory()
        if len(task.pixels) == task.claimed.request.n:
            self._end(task, "succeeded")

    def _fail(self, task: HeldTask, error: Exception) -> None:
        if not isinstance(error, FleetError):
            # the exception's own text may quote the prompt, so it goes neither to the client nor into the log
            log.error("pipeline_failed", task_id=task.claimed.task_id, error=type(error).__name__)
            error = PipelineFailed(f"the picture could not be made ({type(error).__name__})")
        task.error = TaskError(code=error.code, message=error.message, retryable=error.retryable)
        self._end(task, "failed")

    def _end(self, task: HeldTask, outcome: Outcome) -> None:
        if task.outcome is not None:
            return
        task.outcome = outcome
        task.busy_s = time.perf_counter() - task.began if task.began else 0.0
        self._held.remove(task)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not task)
        for picture in [p for p in self._active if p.task is task]:
            self._active.remove(picture)
            pipeline = self._pipeline(task.claimed.request.model)
            pipeline.discard(picture.run)
            pipeline.release_memory()
        if outcome != "succeeded":
            task.pixels.clear()
        self._retire(task)
