"""One model from its catalogue entry to a warm pipeline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from common import registry
from common.errors import DeviceFailed, ModelLoadFailed, OutOfMemory
from common.models import SIZE_MULTIPLE, ModelSpec
from common.telemetry import get_logger
from worker import pipelines
from worker.pipelines.base import BasePipeline, Tuning

log = get_logger()

Cause = Literal["prewarm", "first_use", "again"]
Size = tuple[int, int]  # width and height, in pixels


class Failure(NamedTuple):
    """Why a model could not be loaded. No exception: its traceback would keep what had been loaded so far."""

    message: str
    for_memory: bool


class Loader:
    """Loads the models of one worker."""

    def __init__(self, device: str, tuning: Tuning, warm_sizes: Sequence[Size]) -> None:
        """`device` is "cpu" or "cuda"; of the sizes each model is warmed for those it makes."""
        self._device = device
        self._tuning = tuning
        self._warm_sizes = warm_sizes

    def load(self, spec: ModelSpec, cause: Cause) -> BasePipeline | Failure:
        """Return the model's pipeline, loaded and warm, with a log line; raises DeviceFailed."""
        began = time.perf_counter()
        pipeline: BasePipeline = registry.load(pipelines, spec.pipeline).Pipeline(
            spec, device=self._device, tuning=self._tuning
        )
        failure = self._try(pipeline, spec)
        if failure:
            with contextlib.suppress(Exception):  # it may be half there
                pipeline.unload()
                pipeline.release_memory()
            return failure
        log.info(
            "model_loaded",
            model=spec.name,
            cause=cause,
            source=pipeline.loaded_from or spec.source,
            device=self._device,
            bytes=pipeline.weight_bytes(),
            duration_ms=round((time.perf_counter() - began) * 1000, 1),
        )
        return pipeline

    def _try(self, pipeline: BasePipeline, spec: ModelSpec) -> Failure | None:
        try:
            pipeline.load()
            pipeline.warm([size for size in self._warm_sizes if _is_made(size, spec)])
        except DeviceFailed:
            raise
        except ModelLoadFailed as error:
            return Failure(error.message, _for_memory(error))
        except Exception as error:  # of the warm-up too: a model that cannot make one picture is not served
            return Failure(f"model {spec.name} from {spec.source} cannot be loaded: {error}", _for_memory(error))
        return None


def _is_made(size: Size, spec: ModelSpec) -> bool:
    width, height = size
    sides = all(spec.min_side <= side <= spec.max_side and side % SIZE_MULTIPLE == 0 for side in size)
    return sides and width * height <= spec.max_pixels


def _for_memory(error: Exception) -> bool:
    """Whether memory was what it lacked. Torch's error is known by its name: a worker need not have torch loaded."""
    chain = (error, error.__cause__)
    return any(isinstance(one, OutOfMemory) or type(one).__name__ == "OutOfMemoryError" for one in chain)
