"""Two ways from requests to pictures with the same networks: ours, by step batches, and the stock pipeline's call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.gpu_models import Models
from common.models import BUILT_IN
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline
from worker.zimage.parts import Parts

TURBO = next(spec for spec in BUILT_IN if spec.name == "turbo")


@dataclass
class Made:
    """Pictures in the order of their requests, uint8 (height, width, 3), with the latents they were decoded from."""

    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # (channels, height / 8, width / 8), float32


class Maker(Protocol):
    """Makes pictures; `together` of them at most are in the making at once."""

    name: str

    def make(self, requests: Sequence[ImageRequest], together: int) -> Made:
        """Return the pictures; they are in the machine's memory by then."""


class StepBatches:
    """Our pipeline, driven as the engine drives it: what is active and of like length shares each forward."""

    name = "zfleet"

    def __init__(self, parts: Parts, *, device: str) -> None:
        self.pipeline = Pipeline(TURBO, device=device)
        self.pipeline.adopt(parts)

    def make(
        self, requests: Sequence[ImageRequest], together: int, *, retired: Callable[[], None] = lambda: None
    ) -> Made:
        """Requests of one size are all admitted at once; others one more at every step, as a fleet's tasks come.

        `retired` is called after each picture.
        """
        pipeline = self.pipeline
        staggered = len({(request.width, request.height) for request in requests}) > 1
        waiting = deque(enumerate(requests))
        active: dict[int, Any] = {}
        ended: dict[int, tuple[NDArray[np.uint8], Tensor]] = {}
        while waiting or active:
            room = together - len(active)
            for _ in range(min(room, 1 if staggered else room, len(waiting))):
                index, request = waiting.popleft()
                active[index] = pipeline.start(request)
            for key in dict.fromkeys(pipeline.batch_key(run) for run in active.values()):
                pipeline.step([run for run in active.values() if pipeline.batch_key(run) == key])
            for index, run in [(index, run) for index, run in active.items() if run.done]:
                ended[index] = (pipeline.finish(run), run.latents.squeeze(1))
                pipeline.discard(run)
                del active[index]
                retired()
        inorder = [ended[index] for index in range(len(requests))]
        return Made([picture for picture, _ in inorder], [latents for _, latents in inorder])


class StockCalls:
    """`ZImagePipeline.__call__`: as many as allowed of one size in one call, others one by one."""

    name = "stock"

    def __init__(self, models: Models) -> None:
        self._stock = models.stock()

    def make(self, requests: Sequence[ImageRequest], together: int) -> Made:
        """Return the pictures as PIL made them, which is how a user of the stock pipeline gets them."""
        made = Made()
        alike = len({(request.width, request.height) for request in requests}) == 1
        width = together if alike else 1
        for begin in range(0, len(requests), width):
            self._call(requests[begin : begin + width], made)
        return made

    def _call(self, requests: Sequence[ImageRequest], made: Made) -> None:
        last: list[Tensor] = []

        def keep(_pipeline: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            last[:] = values["latents"]
            return {}

        first = requests[0]
        images = self._stock(
            [request.prompt for request in requests],
            width=first.width,
            height=first.height,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            callback_on_step_end=keep,
        ).images
        made.pictures += [np.asarray(image) for image in images]
        made.latents += last
