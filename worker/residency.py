"""The models in this process's memory: loaded once, warmed, and never unloaded."""

from __future__ import annotations

import time
from collections.abc import Sequence

from common import registry
from common.errors import DeviceFailed, ModelLoadFailed
from common.models import Catalogue
from common.telemetry import get_logger
from worker import pipelines
from worker.pipelines.base import BasePipeline

log = get_logger()


class Residency:
    """Hands out the pipeline of a model. Only the engine's thread calls `pipeline`."""

    def __init__(self, catalogue: Catalogue, *, device: str) -> None:
        self._catalogue = catalogue
        self._device = device
        self._pipelines: dict[str, BasePipeline] = {}

    @property
    def loaded(self) -> Sequence[str]:
        """The aliases of the models in memory."""
        return tuple(self._pipelines)

    def prewarm(self) -> None:
        """Load and warm every model of the catalogue; raises ModelLoadFailed if not one of them can be.

        One that fails beside others is left out: this worker serves the others, and tasks for it wait for a worker
        that can.
        """
        failures = []
        for model in self._catalogue:
            try:
                self.pipeline(model)
            except ModelLoadFailed as error:
                failures.append(ModelLoadFailed(error.message))  # without its traceback, which holds what was loaded
                log.error("model_load_failed", model=model, message=error.message)
        if not self._pipelines:
            raise failures[0]

    def memory_used_mb(self) -> int:
        """Return the device memory that this process holds, in MiB."""
        return max((pipeline.memory_used_mb() for pipeline in self._pipelines.values()), default=0)

    def pipeline(self, model: str) -> BasePipeline:
        """Return the model's pipeline, loaded and warm; raises ModelLoadFailed."""
        if model not in self._pipelines:
            self._pipelines[model] = self._load(model)
        return self._pipelines[model]

    def _load(self, model: str) -> BasePipeline:
        spec = self._catalogue[model]
        began = time.perf_counter()
        module = registry.load(pipelines, spec.pipeline)
        pipeline: BasePipeline = module.Pipeline(spec, device=self._device)
        try:
            pipeline.load()
            pipeline.warm()
        except (ModelLoadFailed, DeviceFailed):
            raise
        except Exception as error:  # of the warm-up too: a model that cannot make one picture is not served
            raise ModelLoadFailed(f"model {model} from {spec.source} cannot be loaded: {error}") from error
        duration_ms = round((time.perf_counter() - began) * 1000, 1)
        log.info("model_loaded", model=model, source=spec.source, device=self._device, duration_ms=duration_ms)
        return pipeline
