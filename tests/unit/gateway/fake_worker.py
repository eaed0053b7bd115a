"""A worker made of the broker's own calls: it claims, paints nothing, and finishes as it is told."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from common.broker import Broker
from common.cards import GpuReading, WorkerCard
from common.records import Claimed, Hold
from common.schemas import ImageRef, TaskError
from common.storage.base import BaseStorage

# A red WebP of 8 x 8 pixels
PICTURE = base64.b64decode("UklGRjYAAABXRUJQVlA4ICoAAACQAQCdASoIAAgAAsBMJaACdLoAA5gA/u2QP4hd7G2//PTP62/j/xkAAAA=")


class FakeWorker:
    """Serves `simulated` under one name."""

    def __init__(self, broker: Broker, storage: BaseStorage | None = None, name: str = "w1") -> None:
        self.broker = broker
        self.storage = storage
        self.name = name

    def beat(self, **changes: object) -> WorkerCard:
        """Be seen alive."""
        now = datetime.now(UTC)
        fields: dict[str, object] = {
            "name": self.name, "host": "host", "pid": 1, "state": "idle", "device": "cuda:0",
            "models": ["simulated", "pico"], "models_loaded": ["simulated"], "capacity": 1, "running": [],
            "loras": [], "images_done": 0, "rss_mb": 1, "started_at": now, "seen_at": now,
            "gpu": GpuReading(name="H200", index=0, memory_used_mb=1000),
        }  # fmt: skip
        card = WorkerCard.model_validate(fields | changes)
        self.broker.beat(card, [], 60)
        return card

    def take(self, room: int = 1) -> Sequence[Claimed]:
        """Claim up to `room` tasks."""
        return self.broker.claim(self.name, "H200", ["simulated"], room).tasks

    def step(self, task: Claimed, step: int) -> None:
        """Tell of a step."""
        self.broker.progress(self.name, {Hold(task.task_id, task.fence): (step, task.request.steps)})

    def succeed(self, task: Claimed) -> None:
        """Store a picture for each that was asked for, and finish."""
        images = []
        for index in range(task.request.n):
            key = f"20260131/{self.name}/{task.task_id}/{index}.{task.request.format}"
            if self.storage is not None:
                self.storage.put(key, PICTURE)
            images.append(
                ImageRef(
                    key=key, width=64, height=64, format=task.request.format, bytes=len(PICTURE),
                    sha256=hashlib.sha256(PICTURE).hexdigest(), seed=task.request.seed + index,
                )
            )  # fmt: skip
        hold = Hold(task.task_id, task.fence)
        assert self.broker.finish(self.name, hold, "succeeded", images=images, busy_ms=40.0) == "ok"

    def fail(self, task: Claimed) -> None:
        """Finish with an error."""
        error = TaskError(code="pipeline_failed", message="no picture came of it")
        assert self.broker.finish(self.name, Hold(task.task_id, task.fence), "failed", error=error) == "ok"

    def work(self) -> str:
        """Claim one task, finish it, and return its id."""
        (task,) = self.take()
        self.succeed(task)
        return task.task_id
