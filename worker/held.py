"""What a worker holds: a task from its claim to its commit, and its pictures while they advance."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.records import Claimed, Fuse, Hold, Verdict
from common.schemas import TaskError
from worker.heartbeat import InHand
from worker.pipelines.base import ImageRequest, Lora, Run
from worker.traces import Step, Trace

Outcome = Literal["succeeded", "failed", "canceled", "released", "lost"]


@dataclass(eq=False, kw_only=True)
class HeldTask:
    """A task this worker holds, from the claim to the commit. Moments are on time.monotonic's clock."""

    claimed: Claimed
    deadline: float | None
    alone: bool = False  # it may have brought a worker down, or did not fit beside others: no other run beside it
    leased_at: float = field(default_factory=time.monotonic)  # its lease was renewed no earlier than this
    verdict: Verdict = "ok"  # set by the thread that talks to Redis; obeyed at the next step
    outcome: Outcome | None = None
    fuse: Fuse | None = None  # the limit that stopped it
    stored: bool = False  # nothing of it is left to be encoded or stored
    error: TaskError | None = None
    inputs: Mapping[str, Sequence[NDArray[np.uint8]]] = field(default_factory=dict)  # by field: the pictures it is from
    loras: Sequence[Lora] = ()
    pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # by picture, (height, width, 3)
    preview: NDArray[np.uint8] | None = None  # the newest that nobody has told of yet, (height, width, 3)
    preview_due: float = 0.0  # when the next one may be made; never, once one could not be
    fuses: dict[int, float] = field(default_factory=dict)  # by picture that is being made: when it must be stopped
    warnings: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # of the pictures begun; what they held on the device may be gone
    began: float | None = None  # time.perf_counter when its first picture was started
    load_s: float = 0.0  # that it waited for its model to be loaded
    encode_s: float = 0.0
    decode_s: float = 0.0
    pictures_s: float = 0.0  # that its pictures were in the making, one after another or not, added up
    busy_s: float = 0.0  # from `began` to its outcome
    trace: Trace | None = None  # where it is traced

    def was_at(self, stage: str, began: float, picture: int | None = None) -> float:
        """Return the seconds since a stage began, on time.perf_counter's clock, having told its trace."""
        ended = time.perf_counter()
        if self.trace is not None:
            self.trace.was_at(stage, began, ended, picture)
        return ended - began

    @property
    def hold(self) -> Hold:
        return Hold(self.claimed.task_id, self.claimed.fence)

    @property
    def about(self) -> Mapping[str, str | int]:
        """What a line of the log says of which task it is about."""
        return {"task_id": self.claimed.task_id, "request_id": self.claimed.request_id, "attempt": self.claimed.fence}

    @property
    def steps_done(self) -> int:
        """Steps that its slowest picture has done."""
        if len(self.runs) < self.claimed.request.n:
            return 0
        return min(run.step for run in self.runs)

    @property
    def denoise_s(self) -> float:
        """Seconds it was busy with neither loading, encoding nor decoding."""
        return max(0.0, self.busy_s - self.load_s - self.encode_s - self.decode_s)

    @property
    def stop(self) -> tuple[float, Fuse]:
        """When it must be stopped, and by which of its two limits."""
        run_limit = min(self.fuses.values(), default=math.inf)
        if self.deadline is not None and self.deadline <= run_limit:
            return self.deadline, "deadline"
        return run_limit, "run_limit"

    def image_request(self, index: int) -> ImageRequest:
        """Return what the pipeline is asked for, for one of its pictures."""
        request = self.claimed.request
        first = {field: found[0] for field, found in self.inputs.items() if found}
        return ImageRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            cfg_normalization=request.cfg_normalization,
            cfg_truncation=request.cfg_truncation,
            seed=request.seed + index,
            init_image=first.get("init_image"),
            strength=request.strength,
            mask_image=first.get("mask_image"),
            control_image=first.get("control_image"),
            control_scale=request.control_scale,
            reference_images=tuple(self.inputs.get("reference_images", ())),
            loras=tuple(self.loras),
        )

    @property
    def in_hand(self) -> InHand:
        """How the supervisor is told of it."""
        return InHand(*self.hold, *self.stop, self.claimed.request_id)


@dataclass(eq=False)
class Picture:
    """One of a task's pictures while its run advances."""

    task: HeldTask
    index: int
    run: Run
    began: float  # time.perf_counter

    @property
    def model(self) -> str:
        return self.task.claimed.request.model


def note_step(batch: Sequence[Picture], began: float) -> None:
    """Tell the traces of these pictures' tasks, where there are any, of the step they have just done together."""
    for picture in batch:
        if (trace := picture.task.trace) is not None:
            trace.stepped(picture.index, Step(picture.run.step, began, time.perf_counter(), len(batch)))
