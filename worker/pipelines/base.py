"""The pipeline port: a model that advances many runs at once, one denoising step at a time.

A pipeline sees requests and hands back arrays. It touches no Redis and no storage. To add one, write a module in this
folder with a class `Pipeline` that fulfils this contract; `tests/contract/test_pipeline.py` then runs over it.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.models import ModelSpec

MIB = 1 << 20


class Lora(NamedTuple):
    """A LoRA's safetensors file, and how strongly it counts."""

    path: Path
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What an operator may choose about how a pipeline uses its device."""

    tile_above: int = 1024 * 1024  # pixels; a larger picture is decoded and encoded in tiles
    embeds_bytes: int = 256 * MIB  # kept of encoded prompts
    offload: Literal["auto", "none", "encoders", "all"] = "auto"  # what waits in the machine's memory until it is used
    memory_bytes: int | None = None  # of the device that this worker may use; None: all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One picture to make: every value is set and within the model's limits.

    Pictures to start from are uint8 arrays of its own size: (height, width, 3), the mask (height, width), white where
    to paint. Reference pictures have sizes of their own.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    steps: int
    guidance_scale: float
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    seed: int
    init_image: NDArray[np.uint8] | None = field(default=None, compare=False)
    strength: float = 1.0
    mask_image: NDArray[np.uint8] | None = field(default=None, compare=False)
    control_image: NDArray[np.uint8] | None = field(default=None, compare=False)
    control_scale: float = 0.0
    reference_images: tuple[NDArray[np.uint8], ...] = field(default=(), compare=False)
    loras: tuple[Lora, ...] = ()


@dataclass(kw_only=True, eq=False)
class Run:
    """A picture in the making. Pipelines subclass it to hold their tensors."""

    request: ImageRequest
    step: int = 0  # denoising steps done, or left out since the picture starts from another one
    warnings: list[str] = field(default_factory=list)  # told to the client, in plain words

    @property
    def done(self) -> bool:
        """Whether every step is done and only `finish` is left."""
        return self.step >= self.request.steps


DEFAULT_TUNING = Tuning()


class BasePipeline(abc.ABC):
    """One model on one device. All calls come from one thread.

    `loaded_from` says, once loaded, where the weights came from, for a log line.

    `start`, `step` and `finish` raise PipelineFailed (or let the library's own error pass) when a picture cannot be
    made; the engine then ends the runs concerned and goes on with the others.
    """

    loaded_from: str = ""

    def __init__(self, spec: ModelSpec, *, device: str, tuning: Tuning = DEFAULT_TUNING) -> None:
        """`device` is "cpu" or "cuda"."""
        self.spec = spec
        self.device = device
        self.tuning = tuning

    @abc.abstractmethod
    def load(self) -> None:
        """Bring the weights onto the device; raises ModelLoadFailed with the remedy."""

    @abc.abstractmethod
    def start(self, request: ImageRequest) -> Run:
        """Encode the prompt and draw the latents; no denoising yet."""

    @abc.abstractmethod
    def step(self, runs: Sequence[Run]) -> None:
        """Advance every run by one step, in one forward for all of them. The runs may differ in size, steps and age."""

    @abc.abstractmethod
    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Decode a run that is done into an array of shape (height, width, 3)."""

    def batch_key(self, run: Run) -> Hashable:
        """Return what two runs must share to share a step."""
        return None

    def preview(self, run: Run) -> NDArray[np.uint8] | None:
        """Return a small picture, (height, width, 3), of what the run is going to show; None where it cannot tell.

        Cheap: nothing is decoded.
        """
        return None

    def discard(self, run: Run) -> None:
        """Drop what the run holds on the device. Safe to call twice, and on a run that was stopped early."""

    def release_memory(self) -> None:
        """Give memory that no run uses any more back to the device."""

    def unload(self) -> int:
        """Let go of the model, for good; return how many bytes of its weights are still held by somebody."""
        return 0

    def weight_bytes(self) -> int:
        """Return how many bytes the model's weights are, wherever they wait."""
        return 0

    def allocated_bytes(self) -> int:
        """Return the device memory in live tensors of this process; 0 where the device does not say."""
        return 0

    def peak_bytes(self, requests: Sequence[ImageRequest]) -> int:
        """Return an estimate, from above, of the device memory that these pictures take while they are made together,
        beside the weights and what the pipeline keeps.
        """
        return 0

    def evict(self) -> None:
        """Let go of all that is kept on the device for later runs (see `counters`), save what runs hold."""

    def counters(self) -> Mapping[str, float]:
        """Return what the pipeline has counted since it was loaded, by metric name. Any thread may ask.

        What ends in `_bytes` is no count: it is how much it keeps on the device now, on purpose.
        """
        return {}

    def memory_used_mb(self) -> int:
        """Device memory this pipeline holds, in MiB; 0 where the device does not say."""
        return 0

    def warm(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Make one picture of each size (width, height) in pixels, so that the first client does not pay for set-up.

        Without sizes, one of the model's own. One step each; two with guidance, as the second may leave it out.
        """
        spec = self.spec
        for width, height in sizes or [(spec.width, spec.height)]:
            request = ImageRequest(
                prompt="warm-up",
                width=width,
                height=height,
                steps=2 if spec.guidance_scale > 0 else 1,
                guidance_scale=spec.guidance_scale,
                cfg_normalization=spec.cfg_normalization,
                cfg_truncation=spec.cfg_truncation,
                seed=0,
            )
            run = self.start(request)
            while not run.done:
                self.step([run])
            self.finish(run)
            self.discard(run)
        self.release_memory()
