"""Where a task was when somebody was last told of it, and what there is to tell since."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from common.schemas import Progress, TaskRecord, TaskStatus

Change: TypeAlias = tuple[int, TaskStatus]  # the number of attempts begun, and the state

PUT_BACK = frozenset({"released", "crashed", "lost"})  # outcomes of attempts after which a task stands in line again

_FORM = re.compile(rf"([0-9]{{1,6}})\.({'|'.join(TaskStatus)})\.([0-9]{{1,6}})(?:\.([0-9a-f]{{8}}))?")


class Place(NamedTuple):
    """A point of a task's life. As text: `<attempts>.<state>.<step>`, and the preview's mark where one was shown."""

    attempt: int
    status: TaskStatus
    step: int
    preview: str = ""

    @classmethod
    def of(cls, record: TaskRecord) -> Place:
        """Return where a task stands."""
        return cls(len(record.attempts), record.status, record.step, mark(record.preview))

    @classmethod
    def parse(cls, text: str | None) -> Place | None:
        """Return the place that was written as this text, or None for any other text."""
        match = _FORM.fullmatch(text or "")
        if match is None:
            return None
        return cls(int(match[1]), TaskStatus(match[2]), int(match[3]), match[4] or "")

    @property
    def change(self) -> Change:
        return self.attempt, self.status

    def is_of(self, record: TaskRecord) -> bool:
        """Return whether this task has been here, as far as its record tells."""
        return self.change == (len(record.attempts), record.status) or self.change in _past(record)

    def __str__(self) -> str:
        return f"{self.attempt}.{self.status}.{self.step}" + (f".{self.preview}" if self.preview else "")


def mark(preview: str | None) -> str:
    """Return what tells one preview from another in a few characters."""
    return f"{zlib.crc32(preview.encode()):08x}" if preview else ""


def news(record: TaskRecord, told: Place | None) -> Iterator[TaskRecord | Progress]:
    """Yield what somebody who was `told` of a place does not know yet: the task at each change, or else a later step.

    Of what has passed meanwhile, the attempts are known and nothing else. For a place where this task has never been
    that is the task as it is.
    """
    now = Place.of(record)
    if told is None or not told.is_of(record):
        yield record
    elif told.change != now.change:
        past = _past(record)
        for attempts, status in past[past.index(told.change) + 1 :]:
            yield _then(record, attempts, status)
        yield record
    elif not record.status.final:
        preview = record.preview if record.request.preview and now.preview != told.preview else None
        if preview or now.step > told.step:
            yield Progress(step=max(now.step, told.step), steps=record.request.steps, preview=preview)


def _past(record: TaskRecord) -> list[Change]:
    """Return the changes before the last one, oldest first."""
    changes: list[Change] = [(0, TaskStatus.QUEUED)]
    for number, attempt in enumerate(record.attempts, 1):
        changes.append((number, TaskStatus.RUNNING))
        if attempt.outcome in PUT_BACK:
            changes.append((number, TaskStatus.QUEUED))
    straight = record.status is TaskStatus.FAILED or record.cancel_requested  # from running: it never was put back
    if not record.status.final or (straight and record.attempts and changes[-1][1] is TaskStatus.QUEUED):
        changes.pop()
    return changes


def _then(record: TaskRecord, attempts: int, status: TaskStatus) -> TaskRecord:
    """Return a task as it was right after an earlier change."""
    begun = list(record.attempts[:attempts])
    if status is TaskStatus.RUNNING:
        begun[-1] = begun[-1].model_copy(update={"outcome": "running", "ended_at": None})
    return record.model_copy(
        update={
            "status": status, "attempts": begun, "started_at": begun[-1].started_at if begun else None, "step": 0,
            "preview": None, "position": None, "eta_seconds": None, "images": (), "error": None, "warnings": (),
            "stages": None, "finished_at": None, "expires_at": None,
        }
    )  # fmt: skip
