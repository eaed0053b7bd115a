"""Any other text-to-image checkpoint of diffusers: its own pipeline's call, one for each run, taken step by step.

Nothing is batched, but progress, cancel and deadline work as everywhere. A model's `options` are further arguments of
the call, as `max_sequence_length = 256`.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from numpy.typing import NDArray

from common.errors import LoraUnusable, ModelLoadFailed, PipelineFailed
from common.models import ModelSpec
from worker.pipelines.base import MIB, BasePipeline, ImageRequest, Run
from worker.stepwise import Stepwise
from worker.zimage.errors import named_errors
from worker.zimage.parts import weights_dtype
from worker.zimage.residue import Traces, allocated_bytes, release_cache, weight_bytes
from worker.zimage.sources import commit, loading, local_folder

NEEDED = ("prompt", "num_inference_steps", "generator", "callback_on_step_end")  # arguments no call can do without


@dataclass
class Count:
    """The steps of a call by its own count: a scheduler may make more or fewer of them than were asked for."""

    done: int = 0
    total: int | None = None  # None: it does not say


@dataclass(kw_only=True, eq=False)
class StockRun(Run):
    """A picture in the making: a call of the library's pipeline that stands still between its steps."""

    call: Stepwise[Any] | None  # None once discarded
    count: Count


class Pipeline(BasePipeline):
    """A diffusers checkpoint: `builtin` (pico), a local folder or a hub id."""

    _pipeline: Any
    _parameters: Mapping[str, inspect.Parameter]  # of its call
    _calls: weakref.WeakSet[Stepwise[Any]]

    def load(self) -> None:
        """Bring the weights onto the device; raises ModelLoadFailed with the remedy."""
        pipeline = _load(self.spec, self.device)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        self.loaded_from = self.spec.source
        self._parameters = _parameters(pipeline)
        self._calls = weakref.WeakSet()

    def start(self, request: ImageRequest) -> Run:
        """Prepare the call. It begins with the first step, which encodes the prompt."""
        if request.loras:
            raise LoraUnusable(f"loras: model {self.spec.name} takes none")
        pictures = (request.init_image, request.mask_image, request.control_image, *request.reference_images)
        if any(picture is not None for picture in pictures):
            raise PipelineFailed(f"model {self.spec.name} makes pictures from text alone")
        count = Count()
        call = Stepwise(_call(self._copy(), self._arguments(request), count))
        self._calls.add(call)
        return StockRun(request=request, call=call, count=count)

    @named_errors()
    def step(self, runs: Sequence[Run]) -> None:
        """Advance every run by one step of its call, one after the other; one that is done is left as it is.

        When a call fails, those before it have moved.
        """
        for run in map(_own, runs):
            if run.call is None:
                raise ValueError("a run that is discarded cannot be stepped")
            if run.done:
                continue
            ended = run.call.advance()
            steps = run.request.steps
            run.step = steps if ended else min(steps, run.count.done * steps // (run.count.total or steps))

    @named_errors()
    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Let the call decode; return its picture, (height, width, 3)."""
        own = _own(run)
        if own.call is None:
            raise ValueError("a run that is discarded cannot be finished")
        output = own.call.complete()
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise PipelineFailed("the model's safety checker withheld this picture; change the prompt or the seed")
        return _picture(output, run.request)

    def discard(self, run: Run) -> None:
        """End the run's call where it stands, and drop it. Safe to call twice, and on a run that never stepped."""
        own = _own(run)
        if own.call is not None:
            own.call.stop()
        own.call = None

    def unload(self) -> int:
        """Let go of the model, for good; return how many bytes of its weights are still held by somebody."""
        for call in tuple(getattr(self, "_calls", ())):
            call.stop()
        if not hasattr(self, "_pipeline"):
            return 0
        traces = Traces(self._models())
        del self._pipeline
        left = traces.left()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return left

    def weight_bytes(self) -> int:
        """Return how many bytes the model's weights are."""
        return weight_bytes(self._models()) if hasattr(self, "_pipeline") else 0

    def allocated_bytes(self) -> int:
        """Return the device memory in live tensors of this process; 0 on a CPU."""
        return allocated_bytes() if self.device == "cuda" else 0

    def release_memory(self) -> None:
        """Give memory that no run uses any more back to the device, where it is worth waiting for."""
        if self.device == "cuda":
            release_cache()

    def memory_used_mb(self) -> int:
        """Device memory in live tensors of this process, in MiB; 0 on a CPU."""
        return self.allocated_bytes() // MIB

    def _models(self) -> list[torch.nn.Module]:
        return [part for part in self._pipeline.components.values() if isinstance(part, torch.nn.Module)]

    def _copy(self) -> Any:
        """Return a pipeline with the same models and schedulers of its own, as each keeps the state of one call.

        A copy and not another instance, as that would forget what the checkpoint's config says beside its parts.
        """
        own = copy.copy(self._pipeline)
        for name, part in self._pipeline.components.items():
            if isinstance(part, SchedulerMixin):
                setattr(own, name, type(part).from_config(part.config))
        return own

    def _arguments(self, request: ImageRequest) -> dict[str, Any]:
        """Return what the call is given of a request: what it has an argument for."""
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "cfg_normalization": request.cfg_normalization,
            "cfg_truncation": request.cfg_truncation,
            "generator": torch.Generator().manual_seed(request.seed),
            "max_sequence_length": self.spec.options.get("max_sequence_length", self._max_tokens()),
            "output_type": "np",
        }
        taken = {name: value for name, value in wanted.items() if value is not None and name in self._parameters}
        return {**self.spec.options, **taken}

    def _max_tokens(self) -> int | None:
        """Return the shorter of the model's limit and the call's own default, past which some models refuse."""
        parameter = self._parameters.get("max_sequence_length")
        own = parameter.default if parameter is not None else None
        return min(self.spec.max_tokens, own) if isinstance(own, int) else None


def _load(spec: ModelSpec, device: str) -> Any:
    """Return the library's pipeline with its weights on the device; raises ModelLoadFailed."""
    if spec.modes != ("text",):
        raise ModelLoadFailed(f"model {spec.name}: pipeline stock makes pictures from text alone; set its modes so")
    with loading(spec, "a text-to-image checkpoint without code of its own"):
        here = local_folder(spec, spec.source)
        pipeline: Any = DiffusionPipeline.from_pretrained(
            here or spec.source,
            revision=None if here else commit(spec, spec.source, spec.revision),
            local_files_only=here is not None,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=weights_dtype(spec, device),
        )
        _check_call(spec, pipeline)
        return pipeline.to(device)


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters


def _check_call(spec: ModelSpec, pipeline: Any) -> None:
    """Raise ModelLoadFailed for a call that cannot be taken step by step, or has no such options."""
    name, parameters = type(pipeline).__name__, _parameters(pipeline)
    if missing := [argument for argument in NEEDED if argument not in parameters]:
        raise ModelLoadFailed(
            f"model {spec.name}: {name} cannot be called with {', '.join(missing)}, which pipeline stock needs; "
            "choose another text-to-image checkpoint"
        )
    if unknown := [option for option in spec.options if option in NEEDED or option not in parameters]:
        raise ModelLoadFailed(f"model {spec.name}: {name} has no such argument: {unknown[0]}; correct its options")


def _call(pipeline: Any, arguments: Mapping[str, Any], count: Count) -> Callable[[Callable[[], None]], Any]:
    """Return a function that calls the library's pipeline, counts its steps, and pauses after each."""

    def function(pause: Callable[[], None]) -> Any:
        def at_step(own: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            count.done += 1
            count.total = getattr(own, "num_timesteps", None)
            pause()
            return values

        with torch.inference_mode():  # which holds for one thread
            return pipeline(**arguments, callback_on_step_end=at_step)

    return function


def _picture(output: Any, request: ImageRequest) -> NDArray[np.uint8]:
    """Return the first image of a call's output, an array of floats in 0..1 or a PIL image, as it was asked for."""
    if not hasattr(output, "images"):
        raise PipelineFailed(f"the model made no picture but a {type(output).__name__}")
    image = output.images[0]
    array = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise PipelineFailed("the model produced values that are not numbers; another seed or size may work")
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    if array.shape != (request.height, request.width, 3):
        raise PipelineFailed(f"the model made an array of {array.shape} of {request.width} x {request.height} pixels")
    return np.ascontiguousarray(array)


def _own(run: Run) -> StockRun:
    if not isinstance(run, StockRun):
        raise TypeError(f"a {type(run).__name__} was not started by this pipeline")
    return run
