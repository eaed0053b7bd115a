"""Small pictures of what is being made, for tasks that asked for them: now and then, and never at a task's cost."""

from __future__ import annotations

import time

from common.errors import DeviceFailed
from common.telemetry import get_logger
from worker.held import Picture
from worker.pipelines.base import BasePipeline

log = get_logger()

PREVIEW_EVERY_S = 0.5


def show(picture: Picture, pipeline: BasePipeline) -> None:
    """Leave a preview with the task if it asked for one and one is due, of the first of its pictures.

    One that cannot be made is the last to be tried. Raises DeviceFailed.
    """
    task = picture.task
    if not task.claimed.request.preview or picture.index or picture.run.done or time.monotonic() < task.preview_due:
        return
    task.preview_due = time.monotonic() + PREVIEW_EVERY_S
    try:
        task.preview = pipeline.preview(picture.run)
    except DeviceFailed:
        raise
    except Exception as error:
        task.preview_due = float("inf")
        log.warning("preview_failed", **task.about, error=type(error).__name__)
