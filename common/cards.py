"""What the fleet says of itself: its queues, its workers, its models and its health, as they travel over the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

from pydantic import Field

from common.models import Mode
from common.schemas import Priority, Stored, Wire


class QueueDepth(Wire):
    """One queue of GET /api/queue."""

    name: str
    model: str
    priority: Priority
    tenant: str
    queued: int
    running: int
    oldest_age_seconds: float | None


WorkerState = Literal["loading", "idle", "busy", "draining", "lost"]


class GpuReading(Stored):
    """What the driver says of a GPU; a figure it does not give is null."""

    name: str
    index: int
    memory_used_mb: int | None = None
    memory_total_mb: int | None = None
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    energy_j: float | None = Field(default=None, description="That it has used since its driver was loaded.")


class WorkerCard(Stored):
    """A worker as it last described itself."""

    name: str
    host: str
    pid: int
    state: WorkerState = Field(description="lost: its GPU is gone.")
    device: str
    gpu: GpuReading | None = None
    models: Sequence[str]
    models_loaded: Sequence[str]
    max_pixels: Mapping[str, int] = Field(
        default_factory=dict, description="Width x height of the largest picture it has memory for, by model."
    )
    loras: Sequence[str] | None = Field(
        default=None, description="The LoRAs in its folder; null while it has not looked there."
    )
    counters: Mapping[str, float] = Field(default_factory=dict, description="What it has counted since it started.")
    capacity: int = Field(description="Runs it can advance together.")
    drained: bool = Field(default=False, description="An operator has it claim nothing.")
    running: Sequence[str] = Field(description="Ids of the tasks it holds.")
    images_done: int
    rss_mb: int
    started_at: datetime
    seen_at: datetime


class ModelView(Wire):
    """A line of GET /api/models: how to ask for this model, and within what limits."""

    name: str
    default: bool
    modes: Sequence[Mode] = Field(description="What it can make a picture from.")
    loras: Sequence[str] = Field(description="That its live workers have; none where it takes none.")
    width: int
    height: int
    steps: int
    guidance_scale: float
    min_side: int
    max_side: int
    max_pixels: int
    size_multiple: int
    max_steps: int
    max_n: int
    max_tokens: int
    workers: int


class Health(Wire):
    """GET /health."""

    status: Literal["healthy", "degraded", "unhealthy"]
    reasons: Sequence[str] = ()
    uptime_seconds: float
    gpu_memory_used_mb: int
    pending_tasks: int
    models_loaded: Sequence[str]
    workers: int


def slot_of(worker: str) -> str:
    """Return the place that a worker has, and its successors after it: its name without the part that is its own."""
    return worker.rpartition(".")[0] or worker
