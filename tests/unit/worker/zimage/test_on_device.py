"""What a GPU asks of every mode, as far as a CPU can tell: weights in bfloat16, and steps that read nothing back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.models import ModelSpec
from tests.miniatures import PICO, control_checkpoint, omni_checkpoint
from tests.unit.worker.zimage.driving import Visit, ask, change, load, masked, painted, together
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 0.01  # mean difference of values in 0..1: bfloat16 has 8 bits, and a batch is summed in another order
READ_BACK = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
GUIDED = {"guidance_scale": 2.0, "cfg_normalization": 0.9, "cfg_truncation": 0.5}
PLAIN = [
    ask(**GUIDED),
    ask(steps=4, init_image=painted(1), strength=0.8, mask_image=masked(1)),
    ask(width=64, init_image=painted(1, width=64), strength=0.8, **GUIDED),
]
CONTROL = [ask(control_image=painted(1), control_scale=0.3), ask(width=128, **GUIDED)]
EDIT = [ask(reference_images=(painted(1),)), ask(reference_images=(painted(2), painted(3)), **GUIDED)]


def make(mode: str, folder: Path) -> tuple[Pipeline, list[ImageRequest]]:
    """Return a pipeline that has the mode, and requests in it."""
    spec: ModelSpec = {
        "control": lambda: control_checkpoint(folder / "control", "control_noise_refiner"),
        "edit": lambda: omni_checkpoint(folder / "omni"),
        "plain": lambda: PICO,
    }[mode]()
    return load(spec), {"control": CONTROL, "edit": EDIT, "plain": PLAIN}[mode]


@pytest.mark.parametrize("mode", ["plain", "control", "edit"])
def test_a_batch_in_bfloat16_is_close_to_each_alone(mode: str, tmp_path: Path) -> None:
    pipeline, requests = make(mode, tmp_path)
    for name in ("vae", "text_encoder", "transformer", "controlnet", "siglip"):
        if part := getattr(pipeline._parts, name):
            part.to(torch.bfloat16)
    pipeline.adopt(pipeline._parts)
    for request, run in zip(requests, together(pipeline, [Visit(request) for request in requests]), strict=True):
        (alone,) = together(pipeline, [Visit(request)])
        assert run.latents.dtype == torch.float32
        assert change(pipeline.decode(run).numpy(), pipeline.decode(alone).numpy()) <= CLOSE


class Recorder(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["plain", "control", "edit"])
def test_a_step_reads_nothing_back_from_the_device(mode: str, tmp_path: Path) -> None:
    """On a GPU each such reading would wait for all that is under way; tests/gpu has the device say so itself."""
    pipeline, requests = make(mode, tmp_path)
    runs = [pipeline.start(request) for request in requests]
    with Recorder() as recorder:
        pipeline.step(runs)
    assert {"aten::cat", "aten::mul"} <= recorder.names
    assert recorder.names & READ_BACK == set()
    with recorder:
        float(runs[0].latents.sum())  # type: ignore[attr-defined]
    assert recorder.names & READ_BACK == {"aten::_local_scalar_dense"}
