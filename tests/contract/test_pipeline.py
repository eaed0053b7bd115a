"""What every module of worker/pipelines keeps to, on the smallest built-in model that it can serve."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import worker.pipelines
from common.errors import ConfigurationError
from common.models import BUILT_IN, ModelSpec
from common.registry import discover, load
from worker.pipelines.base import BasePipeline, ImageRequest, Run, Tuning

FAST = {"simulated": {"image_ms": 4.0, "load_ms": 0.0}}


def built_in(name: str) -> ModelSpec:
    """Return the model that ships with zfleet for this pipeline: without one it could not be tested offline."""
    spec = next((spec for spec in BUILT_IN if spec.pipeline == name and spec.source == "builtin"), None)
    assert spec is not None, f"pipeline {name} needs a model with source `builtin` in common/models.py"
    return spec.model_copy(update={"options": {**spec.options, **FAST.get(name, {})}})


@pytest.fixture(scope="module", params=discover(worker.pipelines))
def pipeline(request: pytest.FixtureRequest) -> Iterator[BasePipeline]:
    tuning = Tuning(embeds_bytes=0)  # so that nobody but a run holds what it was given
    made: BasePipeline = load(worker.pipelines, request.param).Pipeline(
        built_in(request.param), device="cpu", tuning=tuning
    )
    made.load()
    yield made
    made.unload()


def ask(seed: int = 1, *, width: int = 64, height: int = 64, steps: int = 2, guidance: float = 0.0) -> ImageRequest:
    return ImageRequest(
        prompt="a red circle", width=width, height=height, steps=steps, guidance_scale=guidance, seed=seed
    )


def complete(pipeline: BasePipeline, runs: Sequence[Run]) -> list[NDArray[np.uint8]]:
    """Step the runs together until the last is done; return their pictures."""
    while active := [run for run in runs if not run.done]:
        pipeline.step(active)
    return [pipeline.finish(run) for run in runs]


def picture(pipeline: BasePipeline, request: ImageRequest) -> NDArray[np.uint8]:
    return complete(pipeline, [pipeline.start(request)])[0]


def test_the_folder_decides_what_can_be_loaded() -> None:
    assert set(discover(worker.pipelines)) >= {"simulated", "zimage"}
    for name in ("base", "os", "../zimage", "zimage.Pipeline", ""):
        with pytest.raises(ConfigurationError):
            load(worker.pipelines, name)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 112)])
def test_a_picture_is_a_uint8_array_of_the_size_asked_for(pipeline: BasePipeline, width: int, height: int) -> None:
    array = picture(pipeline, ask(width=width, height=height))
    assert array.dtype == np.uint8
    assert array.shape == (height, width, 3)
    assert array.flags.c_contiguous
    assert array.std() > 5


def test_a_run_counts_its_steps_and_is_done_after_the_last(pipeline: BasePipeline) -> None:
    run = pipeline.start(ask(steps=3))
    for step in range(3):
        assert (run.step, run.done) == (step, False)
        pipeline.step([run])
    assert (run.step, run.done) == (3, True)


def test_a_short_prompt_brings_no_warning(pipeline: BasePipeline) -> None:
    assert pipeline.start(ask()).warnings == []


def test_a_step_of_nothing_is_nothing(pipeline: BasePipeline) -> None:
    pipeline.step([])


def test_runs_of_any_size_and_length_share_a_step(pipeline: BasePipeline) -> None:
    requests = [
        ask(1, width=64, height=96, steps=1),
        ask(2, width=128, height=64, steps=4),
        ask(3, steps=2, guidance=3.0),
        ask(4, width=80, height=80, steps=3),
    ]
    arrays = complete(pipeline, [pipeline.start(request) for request in requests])
    for request, array in zip(requests, arrays, strict=True):
        assert array.shape == (request.height, request.width, 3)
        assert_same(array, picture(pipeline, request))


def test_a_run_may_join_runs_that_are_under_way(pipeline: BasePipeline) -> None:
    early, late = pipeline.start(ask(1, steps=4)), pipeline.start(ask(2, width=96, steps=2))
    pipeline.step([early])
    pipeline.step([early, late])
    pipeline.step([late])  # and one may sit a step out
    assert (early.step, late.step) == (2, 2)
    alone = [picture(pipeline, run.request) for run in (early, late)]
    for together, expected in zip(complete(pipeline, [early, late]), alone, strict=True):
        assert_same(together, expected)


def test_a_seed_means_one_picture(pipeline: BasePipeline) -> None:
    assert_same(picture(pipeline, ask(7)), picture(pipeline, ask(7)))
    assert not np.array_equal(picture(pipeline, ask(7)), picture(pipeline, ask(8)))


@pytest.mark.parametrize("seed", [0, 2**31, 2**32, 2**63 - 1])
def test_any_seed_of_63_bits_will_do(pipeline: BasePipeline, seed: int) -> None:
    assert picture(pipeline, ask(seed, steps=1)).shape == (64, 64, 3)


def test_discarding_a_run_frees_what_it_holds(pipeline: BasePipeline) -> None:
    run = pipeline.start(ask(steps=3, guidance=2.0))
    pipeline.step([run])
    held = [weakref.ref(value) for value in arrays_of(run)]
    pipeline.discard(run)
    pipeline.discard(run)
    gc.collect()
    assert not [value for ref in held if (value := ref()) is not None]


def test_discarding_one_run_leaves_the_others(pipeline: BasePipeline) -> None:
    stopped, kept = pipeline.start(ask(1, steps=3)), pipeline.start(ask(2, steps=3))
    pipeline.step([stopped, kept])
    pipeline.discard(stopped)
    assert_same(complete(pipeline, [kept])[0], picture(pipeline, ask(2, steps=3)))


def test_warming_up_leaves_no_trace(pipeline: BasePipeline) -> None:
    before = picture(pipeline, ask(5))
    pipeline.warm()
    assert_same(picture(pipeline, ask(5)), before)


@pytest.mark.parametrize("sizes", [(), ((64, 96),), ((64, 64), (128, 64))])
def test_warming_up_makes_a_picture_of_each_size(
    pipeline: BasePipeline, monkeypatch: pytest.MonkeyPatch, sizes: Sequence[tuple[int, int]]
) -> None:
    made: list[tuple[int, ...]] = []
    finish = pipeline.finish

    def recorded(run: Run) -> NDArray[np.uint8]:
        array = finish(run)
        made.append((array.shape[1], array.shape[0]))
        return array

    monkeypatch.setattr(pipeline, "finish", recorded)
    pipeline.warm(sizes)
    has_a_device = type(pipeline).warm is BasePipeline.warm
    assert made == ((list(sizes) or [(pipeline.spec.width, pipeline.spec.height)]) if has_a_device else [])


def test_memory_is_a_number_of_mebibytes(pipeline: BasePipeline) -> None:
    assert pipeline.memory_used_mb() == 0  # on a CPU the device does not say


@pytest.mark.parametrize("module", ["worker.pipelines.simulated", "worker.pipelines.base", "worker.pico"])
def test_no_torch_where_none_is_needed(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(worker.__path__[0]).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def assert_same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
    """Assert that two pictures are equal but for a value here and there that rounds the other way."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def arrays_of(run: Run) -> Iterator[object]:
    for value in vars(run).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "shape"):
                yield item
