"""A task's attempts in its trace: who waited, who was at what and since when. Told once an attempt has ended.

So it costs a worker two clock readings a stage, and two a step; the spans are made in the committer's thread.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from common import tracing
from common.broker import Broker
from common.records import Claimed
from common.schemas import StageTimings

if TYPE_CHECKING:
    from common.spans import Span, Spans
    from worker.held import HeldTask

NS = 1_000_000_000
MS = 1_000_000
FAILED = ("failed", "crashed", "lost")  # outcomes of an attempt that are errors, whatever their code


class Step(NamedTuple):
    """A denoising step of a picture, as the pipeline counts it. Moments are on time.perf_counter's clock."""

    number: int  # from 1
    began: float
    ended: float
    batch: int  # pictures that advanced together


class Trace:
    """When a task was at what. Moments are on time.perf_counter's clock."""

    def __init__(self, spans: Spans, claimed: Claimed) -> None:
        self._spans = spans
        self._claimed = claimed
        self._taken = time.perf_counter()
        self._epoch_ns = time.time_ns() - int(self._taken * NS)
        self._stages: dict[tuple[str, int | None], tuple[float, float]] = {}
        self._steps: dict[int, list[Step]] = {}  # by picture

    def was_at(self, stage: str, began: float, ended: float, picture: int | None = None) -> None:
        """Note a stage of the task, or of one of its pictures; the last time counts."""
        self._stages[stage, picture] = (began, ended)
        if stage == "encode" and picture is not None:
            self._steps[picture] = []  # it is begun, perhaps anew

    def stepped(self, picture: int, step: Step) -> None:
        """Note a step that one of its pictures has done."""
        self._steps[picture].append(step)

    def tell(self, task: HeldTask, worker: str, stages: StageTimings) -> None:
        """Make the spans of this attempt, which ends now."""
        claimed, request = self._claimed, self._claimed.request
        about = {"zfleet.task_id": claimed.task_id, "zfleet.request_id": claimed.request_id}
        _tell_wait(self._spans, claimed.traceparent, self._at(self._taken), claimed.waited_ms, about)
        attributes: dict[str, str | int | float] = {
            **about, "zfleet.attempt": claimed.fence, "zfleet.worker": worker, "zfleet.model": request.model,
            "zfleet.outcome": task.outcome or "", "zfleet.width": request.width, "zfleet.height": request.height,
            "zfleet.steps": request.steps, "zfleet.images": request.n, "zfleet.denoise_ms": stages.denoise_ms,
        }  # fmt: skip
        attempt = _begin_attempt(self._spans, claimed.traceparent, self._at(self._taken), attributes)
        self._note_denoising(task)
        for (stage, picture), (began, ended) in self._stages.items():
            which = {} if picture is None else {"zfleet.picture": picture}
            span = self._spans.start(stage, attempt, at_ns=self._at(began), attributes=which)
            if stage == "denoise" and picture is not None:
                self._tell_steps(span, picture)
            span.end(at_ns=self._at(ended))
        attempt.end(error=task.error.code if task.error else "failed" if task.outcome in FAILED else "")

    def _note_denoising(self, task: HeldTask) -> None:
        """A picture is denoised from when it has been encoded until it is decoded, or its task stopped."""
        stopped = task.began + task.busy_s if task.began else self._taken
        for index in range(task.claimed.request.n):
            if encoded := self._stages.get(("encode", index)):
                decoded = self._stages.get(("decode", index))
                self._stages["denoise", index] = (encoded[1], max(encoded[1], decoded[0] if decoded else stopped))

    def _tell_steps(self, denoise: Span, picture: int) -> None:
        steps = self._claimed.request.steps
        for step in self._steps[picture]:
            attributes = {
                "zfleet.picture": picture, "zfleet.step": step.number, "zfleet.steps": steps, "zfleet.batch": step.batch
            }  # fmt: skip
            span = self._spans.start("step", denoise, at_ns=self._at(step.began), attributes=attributes)
            span.end(at_ns=self._at(step.ended))

    def _at(self, moment: float) -> int:
        return self._epoch_ns + int(moment * NS)


def begin(claimed: Claimed) -> Trace | None:
    """Return the trace of a task that has just been claimed; None where it is not traced."""
    spans = tracing.spans()
    return Trace(spans, claimed) if spans is not None and claimed.traceparent else None


def tell_of_the_dead(broker: Broker, task_id: str, fence: int) -> None:
    """Tell of an attempt whose worker no longer can; raises RedisUnavailable."""
    spans = tracing.spans()
    found = broker.traced(task_id, fence) if spans is not None else None
    if spans is None or found is None or found.attempt is None:
        return
    about, attempt = {"zfleet.task_id": task_id, "zfleet.request_id": found.request_id}, found.attempt
    began_ms, ended_ms = _ms(attempt.started_at), _ms(attempt.ended_at or attempt.started_at)
    _tell_wait(spans, found.traceparent, began_ms * MS, began_ms - found.in_line_ms, about)
    attributes: dict[str, str | int | float] = {
        **about, "zfleet.attempt": fence, "zfleet.worker": attempt.worker, "zfleet.model": found.model,
        "zfleet.outcome": attempt.outcome,
    }  # fmt: skip
    span = _begin_attempt(spans, found.traceparent, began_ms * MS, attributes)
    span.end(at_ns=ended_ms * MS, error=attempt.outcome if attempt.outcome in FAILED else "")


def tell_of_the_expired(broker: Broker, task_id: str) -> None:
    """Tell of a task that nobody began in time; raises RedisUnavailable."""
    spans = tracing.spans()
    found = broker.traced(task_id) if spans is not None else None
    if spans is not None and found is not None:
        about = {"zfleet.task_id": task_id, "zfleet.request_id": found.request_id, "zfleet.outcome": "expired"}
        now_ns = time.time_ns()
        _tell_wait(spans, found.traceparent, now_ns, now_ns // MS - found.in_line_ms, about, error="deadline_exceeded")


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _tell_wait(
    spans: Spans, parent: str, until_ns: int, waited_ms: int, about: dict[str, str], *, error: str = ""
) -> None:
    span = spans.start("queued", parent, at_ns=until_ns - max(0, waited_ms) * MS, attributes=about)
    span.end(at_ns=until_ns, error=error)


def _begin_attempt(spans: Spans, parent: str, at_ns: int, attributes: dict[str, str | int | float]) -> Span:
    from common.spans import CONSUMER

    return spans.start("attempt", parent, kind=CONSUMER, at_ns=at_ns, attributes=attributes)
