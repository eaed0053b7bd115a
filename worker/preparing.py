"""What a claimed task needs before the engine takes it: the pictures it is made from, and its LoRAs' files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from common import inputs
from common.errors import FleetError, StorageError
from common.schemas import TaskError
from common.storage.base import BaseStorage
from common.telemetry import get_logger, lines_about
from worker import loras
from worker.held import HeldTask
from worker.inputs import Inputs

log = get_logger()

LOOK_EVERY_S = 5.0  # at the folder of LoRAs


class Preparer:
    """Belongs to the feeder's thread, which may hang on a file system without holding up the pulse."""

    def __init__(
        self,
        storage: BaseStorage,
        lora_dir: Path | None,
        reading: Callable[[HeldTask | None], AbstractContextManager[Callable[[], None]]],
    ) -> None:
        """`reading` is around all that is read from a file system: see Committer.reading."""
        self._inputs = Inputs(storage)
        self._lora_dir = lora_dir
        self._reading = reading
        self._looked_at = -LOOK_EVERY_S
        self.loras: Sequence[str] | None = None  # the names of those in the folder, as of late; None before a look

    def look(self) -> None:
        """See now and then which LoRAs there are."""
        if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            with self._reading(None):
                self.loras = loras.available(self._lora_dir)
            self._looked_at = time.monotonic()

    def prepare(self, task: HeldTask) -> bool:
        """Give the task what it needs; where that cannot be had it ends here as failed, and this is False."""
        request = task.claimed.request
        try:
            if request.loras or inputs.named(request):
                with lines_about(**task.about), self._reading(task) as another:
                    task.loras = loras.resolve(self._lora_dir, request.loras)
                    task.inputs = self._inputs.fetch(request, another)
        except Exception as error:
            if not isinstance(error, FleetError):
                log.error("input_failed", **task.about, error=type(error).__name__)
                error = StorageError(f"what it is made from could not be read ({type(error).__name__})")
            task.error = TaskError(code=error.code, message=error.message, retryable=error.retryable)
            task.outcome = "failed"
            return False
        return True
