"""How tests drive the batched pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.models import ModelSpec
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline, ZImageRun

TOLERANCE = 1e-4  # of values in 0..1; a step of uint8 is forty times that
NOTICED = 0.005  # mean of values in 0..1: another condition changes more than this
PROMPT = "a red circle left of a green square on a grey background"

Picture = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Visit(NamedTuple):
    """A request, when it is admitted, and after how many of its steps it is cancelled."""

    request: ImageRequest
    tick: int = 0
    leaves_after: int | None = None


def load(spec: ModelSpec) -> Pipeline:
    made = Pipeline(spec, device="cpu")
    made.load()
    return made


def ask(prompt: str = PROMPT, **changes: Any) -> ImageRequest:
    fields: dict[str, Any] = {"width": 96, "height": 64, "steps": 3, "guidance_scale": 0.0, "seed": 1}
    return ImageRequest(prompt=prompt, **(fields | changes))


def painted(seed: int, *, width: int = 96, height: int = 64) -> Picture:
    """Paint a picture of soft patches of colour."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))


def masked(seed: int, *, width: int = 96, height: int = 64) -> Picture:
    """Draw a mask with soft edges, its greys on both sides of the middle."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BILINEAR))


def together(pipeline: Pipeline, visits: Sequence[Visit]) -> list[ZImageRun]:
    """Advance requests together, each from its tick on, all that can be in one forward; return their runs in order."""
    runs: dict[int, ZImageRun] = {}
    leaves: dict[int, int | None] = {}  # the step at which a run is cancelled
    for tick in range(1000):
        for index, visit in enumerate(visits):
            if visit.tick == tick:
                run = pipeline.start(visit.request)
                assert isinstance(run, ZImageRun)
                runs[index] = run
                leaves[index] = None if visit.leaves_after is None else run.step + visit.leaves_after
        for index, run in runs.items():
            if run.step == leaves[index]:
                pipeline.discard(run)
        active = [run for run in runs.values() if run.captions and not run.done]
        if not active and len(runs) == len(visits):
            return [runs[index] for index in range(len(visits))]
        for key in {pipeline.sharing(run) for run in active}:
            mates = [run for run in active if pipeline.sharing(run) == key]
            pipeline.step(mates[:: -1 if tick % 2 else 1])
    raise AssertionError("some run is never done")


def pictures(pipeline: Pipeline, *requests: ImageRequest) -> list[Floats]:
    """Make pictures together, as floats."""
    return [pipeline.decode(run).numpy() for run in together(pipeline, [Visit(request) for request in requests])]


def picture(pipeline: Pipeline, request: ImageRequest) -> Floats:
    """Make one picture alone, as floats."""
    return pictures(pipeline, request)[0]


def difference(one: Floats, other: Floats) -> float:
    """Return the largest difference."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def change(one: Floats, other: Floats) -> float:
    """Return the mean difference."""
    assert one.shape == other.shape
    return float(np.abs(one - other).mean())


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Count the items in each forward of this model, in order."""
    items: list[int] = []
    hook = model.register_forward_pre_hook(lambda _model, args: items.append(len(args[0])))
    try:
        yield items
    finally:
        hook.remove()
