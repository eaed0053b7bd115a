"""Models that come and go on a real GPU: what they take, what they leave, and what fits beside them."""

from __future__ import annotations

import pytest

from common.errors import OutOfMemory
from common.models import BUILT_IN, Catalogue
from worker.pipelines.base import MIB, ImageRequest
from worker.residency import Residency

pytestmark = pytest.mark.gpu

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
MODELS = Catalogue([PICO.model_copy(update={"name": name}) for name in ("one", "two")])


def make(residency: Residency, model: str, side: int = 128) -> None:
    """Make a picture, as the engine does."""
    request = ImageRequest(prompt="a red circle", width=side, height=side, steps=4, guidance_scale=0.0, seed=1)
    assert residency.acquire(model) is not None
    assert residency.fits(model, [request])
    pipeline = residency.pipeline(model)
    run = pipeline.start(request)
    while not run.done:
        pipeline.step([run])
    assert pipeline.finish(run).any()
    pipeline.discard(run)
    pipeline.release_memory()
    residency.release(model)
    residency.settle(model, {})


def test_models_that_take_turns_leave_nothing_on_the_device() -> None:
    import torch

    residency = Residency(MODELS, device="cuda", max_resident=1)
    residency.prewarm()
    level = torch.cuda.memory_allocated()
    for _ in range(3):
        for model in ("two", "one"):
            make(residency, model)
    counters = residency.counters()
    assert (counters["models_unloaded_total"], counters["memory_residues"]) == (6, 0)
    assert not residency.leaked
    # beside the weights there are what cuBLAS keeps for itself and the encoded prompt
    assert torch.cuda.memory_allocated() - level < 64 * MIB


def test_what_a_model_takes_is_measured_and_bounds_its_pictures() -> None:
    roomy = Residency(MODELS, device="cuda", memory_mb=4000)
    roomy.prewarm()
    assert roomy.largest["one"] == PICO.max_pixels
    make(roomy, "one", side=256)
    weights_mb = roomy.pipeline("one").weight_bytes() // MIB
    roomy.unload("one", "idle")
    small = Residency(MODELS, device="cuda", memory_mb=weights_mb + 90)
    small.prewarm()
    assert 64 * 64 < small.largest["one"] < PICO.max_pixels  # 67 MiB are needed for the smallest, 106 for the largest
    with pytest.raises(OutOfMemory, match="ask for a smaller one"):
        make(small, "one", side=256)
