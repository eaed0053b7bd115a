"""On a GPU: batches equal the stock calls, a seed draws what it draws on a CPU, and memory comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray

from common.errors import OutOfMemory
from common.models import BUILT_IN, ModelSpec
from tests.miniatures import control_checkpoint, omni_checkpoint
from tests.unit.worker.zimage.driving import Visit, ask, change, masked, painted, together
from worker import pico
from worker.pipelines.base import ImageRequest, Tuning
from worker.pipelines.zimage import Pipeline
from worker.zimage import residue

pytestmark = pytest.mark.gpu

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
FLOAT32 = 1e-3  # largest difference of values in 0..1: other tile shapes, and TF32 in the decoder's convolutions
BFLOAT16 = 0.04  # mean difference: on a CPU up to 0.021, with guidance; another prompt's picture is 0.15 away
MIB = 1 << 20


def load(device: str, dtype: str = "float32", spec: ModelSpec = PICO) -> Pipeline:
    made = Pipeline(spec.model_copy(update={"dtype": dtype}), device=device)
    made.load()
    return made


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    made = load("cuda")
    yield made
    made.release_memory()


def requests(seed: int) -> list[ImageRequest]:
    """Draw a batch of four of different sizes, step counts and guidance."""
    draw = random.Random(seed)
    return [
        ImageRequest(
            prompt=draw.choice(("a red circle left of a green square", "左边红色圆形，灰色背景", "🦊 " * 200)),
            negative_prompt="blurry",
            width=draw.choice((64, 96, 128, 256)),
            height=draw.choice((64, 112, 160, 256)),
            steps=draw.randint(1, 8),
            guidance_scale=guidance,
            seed=draw.randrange(2**32),
        )
        for guidance in (0.0, 0.0, 0.0, 3.0)
    ]


def batched(pipeline: Pipeline, asked: list[ImageRequest]) -> list[NDArray[np.float32]]:
    """Admit one more request at every step; return the pictures as floats."""
    runs = [pipeline.start(request) for request in asked]
    admitted = 1
    while active := [run for run in runs[:admitted] if not run.done] or runs[admitted : admitted + 1]:
        pipeline.step(active)
        admitted += 1
    return [pipeline.decode(run).cpu().numpy() for run in runs]


def reference(asked: list[ImageRequest], dtype: torch.dtype) -> list[NDArray[np.float32]]:
    stock: Any = ZImagePipeline.from_pretrained(pico.FOLDER, dtype=dtype, local_files_only=True).to("cuda")
    stock.set_progress_bar_config(disable=True)
    return [
        stock(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            max_sequence_length=PICO.max_tokens,
            output_type="np",
        ).images[0]
        for request in asked
    ]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_in_float32_equals_the_stock_calls(pipeline: Pipeline, seed: int) -> None:
    asked = requests(seed)
    for mine, theirs in zip(batched(pipeline, asked), reference(asked, torch.float32), strict=True):
        assert np.abs(mine - theirs).max() <= FLOAT32


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_in_bfloat16_is_close_to_the_stock_calls(seed: int) -> None:
    asked = requests(seed)
    pipeline = load("cuda", "bfloat16")
    assert pipeline._parts.transformer.dtype is torch.bfloat16
    for mine, theirs in zip(batched(pipeline, asked), reference(asked, torch.bfloat16), strict=True):
        assert np.abs(mine - theirs).mean() <= BFLOAT16


STARTED = {"init_image": painted(1), "strength": 0.8}
GUIDED = {"guidance_scale": 2.0, "cfg_normalization": 0.9, "cfg_truncation": 0.5}
PLAIN = {
    "guided": ask(**GUIDED),
    "image": ask(steps=4, **STARTED),
    "inpaint": ask(steps=5, **STARTED, mask_image=masked(1)),
    "text": ask(width=128),
}


def assert_company_changes_nothing(pipeline: Pipeline, asked: Sequence[ImageRequest]) -> None:
    for request, run in zip(asked, together(pipeline, [Visit(request) for request in asked]), strict=True):
        (alone,) = together(pipeline, [Visit(request)])
        made, expected = (pipeline.decode(one).cpu().numpy() for one in (run, alone))
        assert np.isfinite(made).all()
        assert change(made, expected) <= BFLOAT16


@pytest.mark.parametrize("mode", ["guided", "image", "inpaint"])
def test_pictures_in_bfloat16_are_the_same_in_company(mode: str) -> None:
    assert_company_changes_nothing(load("cuda", "bfloat16"), [PLAIN[mode], *PLAIN.values()])


def test_control_in_bfloat16_is_the_same_in_company(tmp_path: Path) -> None:
    spec = control_checkpoint(tmp_path / "control", "control_noise_refiner", channels=33)
    small = {"control_image": painted(2, width=64), "control_scale": 0.2, "width": 64}
    asked = [ask(control_image=painted(1), control_scale=0.5), ask(**small, **GUIDED), *PLAIN.values()]
    assert_company_changes_nothing(load("cuda", "bfloat16", spec), asked)


def test_edits_in_bfloat16_are_the_same_in_company(tmp_path: Path) -> None:
    spec = omni_checkpoint(tmp_path / "omni")
    edits = [ask(reference_images=(painted(1),)), ask(reference_images=(painted(2), painted(3, width=64)), **GUIDED)]
    assert_company_changes_nothing(load("cuda", "bfloat16", spec), [*edits, ask(), ask(width=128, **GUIDED)])


def test_a_step_does_not_wait_for_the_device(pipeline: Pipeline) -> None:
    runs = [pipeline.start(request) for request in PLAIN.values()]
    pipeline.step(runs)  # the first brings the position tables over
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline.step(runs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_seed_means_the_same_picture_on_a_cpu(pipeline: Pipeline) -> None:
    asked = requests(9)
    for here, there in zip(batched(pipeline, asked), batched(load("cpu"), asked), strict=True):
        assert np.abs(here - there).max() <= 5 * FLOAT32


def test_runs_give_their_memory_back_when_discarded(pipeline: Pipeline) -> None:
    def stop_at(step: int) -> None:
        runs = [pipeline.start(request) for request in requests(3)]
        for _ in range(step):
            pipeline.step([run for run in runs if not run.done])
        assert torch.cuda.memory_allocated() > settled
        for run in runs:
            if run.done:
                pipeline.finish(run)
            pipeline.discard(run)

    settled = 0
    stop_at(8)  # the first time brings in the libraries' workspaces, which stay
    settled = torch.cuda.memory_allocated()
    for step in (8, 1, 0, 8):
        stop_at(step)
        assert torch.cuda.memory_allocated() == settled


def test_unused_memory_goes_back_to_the_device(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.empty_cache()
    low = torch.cuda.memory_reserved()
    assert pipeline.memory_used_mb() == torch.cuda.memory_allocated() // MIB
    scratch = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    del scratch
    pipeline.release_memory()
    assert torch.cuda.memory_reserved() >= low + 512 * MIB  # so little stays, for the next picture
    monkeypatch.setattr(residue, "IDLE_SHARE", 0.0)
    pipeline.release_memory()
    assert torch.cuda.memory_reserved() <= low


def test_releasing_memory_does_not_wait_for_the_device(pipeline: Pipeline) -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        torch.mm(matrix, matrix)
    began = time.perf_counter()
    pipeline.release_memory()
    kept_ms = (time.perf_counter() - began) * 1000
    busy = not torch.cuda.current_stream().query()
    began = time.perf_counter()
    torch.cuda.empty_cache()
    emptied_ms = (time.perf_counter() - began) * 1000
    print(f"release_memory: {kept_ms:.3f} ms while the device is busy; empty_cache: {emptied_ms:.3f} ms")
    assert busy
    assert kept_ms < 2.0


def test_of_a_model_that_is_unloaded_nothing_is_left() -> None:
    made = load("cuda", "bfloat16")
    made.warm(((64, 64),))
    held = made._parts.vae.decoder.conv_in.weight
    assert made.weight_bytes() > 0
    assert made.unload() == held.nbytes
    again = load("cuda", "bfloat16")
    again.warm(((64, 64),))
    assert again.unload() == 0


@pytest.mark.parametrize("choice", ["encoders", "all"])
def test_pictures_are_the_same_whatever_waits(pipeline: Pipeline, choice: Literal["encoders", "all"]) -> None:
    spec = ModelSpec.model_validate(PICO.model_dump() | {"dtype": "float32"})
    waiting = Pipeline(spec, device="cuda", tuning=Tuning(offload=choice))
    waiting.load()
    assert next(waiting._parts.text_encoder.parameters()).device.type == "cpu"
    assert waiting._parts.transformer.layers[0].attention.to_q.weight.is_cuda == (choice == "encoders")
    for seed in (1, 2):  # what is fetched ahead is known from the second time on
        for mine, theirs in zip(batched(waiting, requests(seed)), batched(pipeline, requests(seed)), strict=True):
            assert np.abs(mine - theirs).max() <= FLOAT32
    assert waiting.unload() == 0


def test_previews_are_drawn_on_the_device(pipeline: Pipeline) -> None:
    run = pipeline.start(requests(5)[0])
    pipeline.step([run])
    preview = pipeline.preview(run)
    assert preview is not None
    assert preview.std() > 5


def test_a_picture_leaves_the_gpu_as_an_array(pipeline: Pipeline) -> None:
    run = pipeline.start(requests(5)[0])
    while not run.done:
        pipeline.step([run])
    array = pipeline.finish(run)
    assert array.dtype == np.uint8
    assert array.shape == (run.request.height, run.request.width, 3)


def test_after_out_of_memory_the_next_picture_is_made(pipeline: Pipeline) -> None:
    total = torch.cuda.mem_get_info()[1]
    run = pipeline.start(requests(1)[0])
    crowd = [pipeline.start(request) for request in requests(2) * 64]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + MIB) / total)
    try:
        with pytest.raises(OutOfMemory):
            pipeline.step(crowd)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pipeline.release_memory()
    while not run.done:
        pipeline.step([run])
    assert pipeline.finish(run).any()
