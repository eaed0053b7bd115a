"""The pipeline port: a model that advances many runs at once, one denoising step at a time.

A pipeline sees requests and hands back arrays. It touches no Redis and no storage. To add one, write a module in this
folder with a class `Pipeline` that fulfils this contract; `tests/contract/test_pipeline.py` then runs over it.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.models import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One picture to make: every value is set and within the model's limits."""

    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int


@dataclass(kw_only=True, eq=False)
class Run:
    """A picture in the making. Pipelines subclass it to hold their tensors."""

    request: ImageRequest
    step: int = 0  # denoising steps done
    warnings: list[str] = field(default_factory=list)  # told to the client, in plain words

    @property
    def done(self) -> bool:
        """Whether every step is done and only `finish` is left."""
        return self.step >= self.request.steps


class BasePipeline(abc.ABC):
    """One model on one device. All calls come from one thread.

    `start`, `step` and `finish` raise PipelineFailed (or let the library's own error pass) when a picture cannot be
    made; the engine then ends the runs concerned and goes on with the others.
    """

    def __init__(self, spec: ModelSpec, *, device: str) -> None:
        """`device` is "cpu" or "cuda"."""
        self.spec = spec
        self.device = device

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

    def discard(self, run: Run) -> None:
        """Drop what the run holds on the device. Safe to call twice, and on a run that was stopped early."""

    def release_memory(self) -> None:
        """Give memory that no run uses any more back to the device."""

    def memory_used_mb(self) -> int:
        """Device memory this pipeline holds, in MiB; 0 where the device does not say."""
        return 0

    def warm(self) -> None:
        """Make one small picture, so that the first client does not pay for set-up."""
        spec = self.spec
        side = min(spec.width, spec.height)
        request = ImageRequest(
            prompt="warm-up", width=side, height=side, steps=1, guidance_scale=spec.guidance_scale, seed=0
        )
        run = self.start(request)
        self.step([run])
        self.finish(run)
        self.discard(run)
        self.release_memory()
