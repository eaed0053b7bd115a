"""Tasks: how many, what became of them, and where their time went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import HistogramMetricFamily, Metric

from common.histograms import BATCH_SIZES, SECONDS, STAGE_SECONDS, Bounds
from common.history import OUTCOMES
from common.records import Fate, Fuse
from gateway.metrics.look import MICRO, Look, counter

OF_MODEL = ["model"]


def tasks(look: Look) -> Iterator[Metric]:
    """Yield how many tasks came and ended, and what they made."""
    models = look.models
    about = "Tasks that were accepted."
    yield from counter("zfleet_tasks_submitted_total", about, OF_MODEL, look.counted("submitted", models))
    about = "Tasks that ended, by their final state."
    rows = look.counted("tasks", models, OUTCOMES)
    yield from counter("zfleet_tasks_total", about, [*OF_MODEL, "outcome"], rows)
    about = "Pictures of tasks that succeeded."
    yield from counter("zfleet_images_total", about, OF_MODEL, look.counted("images", models))


def durations(look: Look) -> Iterator[Metric]:
    """Yield where tasks' time went."""
    about = "From submit to the first worker that began it."
    name = "zfleet_task_queue_seconds"
    yield from look.histogram("waited", Bounds(SECONDS), (name, about), OF_MODEL, unit=MICRO)
    about = "From submit to result, of tasks that succeeded."
    name = "zfleet_task_duration_seconds"
    yield from look.histogram("took", Bounds(SECONDS), (name, about), OF_MODEL, unit=MICRO)
    about = "Time in a stage on the worker, of tasks that succeeded and spent any there."
    name, labels = "zfleet_stage_duration_seconds", [*OF_MODEL, "stage"]
    yield from look.histogram("stage", Bounds(STAGE_SECONDS), (name, about), labels, unit=MICRO)


def steps(look: Look) -> Iterator[Metric]:
    """Yield how many pictures advanced together, and so how many steps they took."""
    about = "Pictures that advanced together, for each denoising step of a worker."
    (family,) = look.histogram("batch", Bounds(BATCH_SIZES), ("zfleet_batch_size", about), OF_MODEL)
    yield family
    about = "Denoising steps, counted for each picture."
    sums = {values[0]: count for values, count in look.counted("batch") if values[1] == "sum"}
    rows = [([model], sums.get(model, 0)) for model in sorted({*look.models, *sums})]
    yield from counter("zfleet_steps_total", about, OF_MODEL, rows)


def trouble(look: Look) -> Iterator[Metric]:
    """Yield what went wrong."""
    about = "Workers that died unasked or had to be killed."
    yield from counter("zfleet_worker_crashes_total", about, [], [([], look.counts.get("crashes", 0))])
    about = "Runs taken back from dead or silent workers; quarantined: their task failed for good."
    yield from counter("zfleet_tasks_reaped_total", about, ["outcome"], look.counted("reaped", get_args(Fate)))
    about = "Tasks stopped by a limit: their own deadline, or their model's run_limit_s."
    yield from counter("zfleet_fuses_tripped_total", about, ["cause"], look.counted("fuses", get_args(Fuse)))


def eta_error_ratio(look: Look) -> Iterator[Metric]:
    """Yield how far off the estimates were that submits were answered with."""
    family = HistogramMetricFamily(
        "zfleet_eta_error_ratio",
        "|actual - estimated| / actual time from submit to result, of tasks that succeeded.",
        labels=OF_MODEL,
    )
    for model, errors in sorted(look.eta_errors.items()):
        family.add_metric([model], buckets=list(errors.buckets), sum_value=errors.sum)
    yield family


SOURCES = (tasks, durations, steps, trouble, eta_error_ratio)
