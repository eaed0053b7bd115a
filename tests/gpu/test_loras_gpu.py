"""On a GPU: LoRAs draw what the stock pipeline draws with them, and all memory comes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray

from common.errors import OutOfMemory
from common.models import BUILT_IN
from tests.unit.worker.zimage.lorafiles import write_lora
from worker import pico
from worker.pipelines.base import ImageRequest, Lora
from worker.pipelines.stock import Pipeline as StockPipeline
from worker.pipelines.zimage import Pipeline

pytestmark = pytest.mark.gpu

SPECS = {spec.name: spec for spec in BUILT_IN}
FLOAT32 = 1e-3  # largest difference of values in 0..1


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    made = Pipeline(SPECS["pico"], device="cuda")
    made.load()
    yield made
    made.release_memory()


def ask(*loras: Lora, steps: int = 3) -> ImageRequest:
    return ImageRequest(
        prompt="a red circle", width=128, height=96, steps=steps, guidance_scale=0.0, seed=1, loras=loras
    )


def picture(pipeline: Pipeline, *loras: Lora) -> NDArray[np.float32]:
    run = pipeline.start(ask(*loras))
    while not run.done:
        pipeline.step([run])
    array: NDArray[np.float32] = pipeline.decode(run).cpu().numpy()
    pipeline.discard(run)
    return array


def test_loras_equal_the_stock_call_and_switching_back_is_exact(pipeline: Pipeline, tmp_path: Path) -> None:
    stock: Any = ZImagePipeline.from_pretrained(pico.FOLDER, dtype=torch.float32, local_files_only=True).to("cuda")
    before = picture(pipeline)
    for seed in (1, 2):
        lora = Lora(write_lora(tmp_path / f"{seed}.safetensors", seed), 0.7)
        stock.load_lora_weights(str(tmp_path), weight_name=lora.path.name, adapter_name="a")
        stock.set_adapters(["a"], [lora.scale])
        request = ask(lora)
        expected = stock(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            max_sequence_length=SPECS["pico"].max_tokens,
            output_type="np",
        ).images[0]
        stock.unload_lora_weights()
        assert np.abs(picture(pipeline, lora) - expected).max() <= FLOAT32
    np.testing.assert_array_equal(picture(pipeline), before)


def test_evicting_gives_the_memory_back(pipeline: Pipeline, tmp_path: Path) -> None:
    adapters = pipeline._adapters
    adapters._make_room(1 << 40, ())
    gc.collect()
    settled = torch.cuda.memory_allocated()
    picture(pipeline, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))
    assert torch.cuda.memory_allocated() - settled >= adapters.nbytes > 0
    adapters._make_room(1 << 40, ())
    gc.collect()
    assert torch.cuda.memory_allocated() == settled


def test_a_lora_for_which_there_is_no_memory_leaves_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "wide.safetensors", rank=20_000)
    pipeline._adapters._make_room(1 << 40, ())
    pipeline.release_memory()
    settled, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        with pytest.raises(OutOfMemory):
            pipeline.start(ask(Lora(path, 1.0)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == settled
    assert len(pipeline._adapters._kept) == 0
    picture(pipeline, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))


def test_the_stock_pipeline_gives_its_memory_back() -> None:
    made = StockPipeline(SPECS["pico-stock"], device="cuda")
    made.load()
    made.warm()
    gc.collect()
    settled = made.allocated_bytes()
    for steps in (0, 1, 3):
        run = made.start(ask())
        for _ in range(steps):
            made.step([run])
        if run.done:
            assert made.finish(run).shape == (96, 128, 3)
        made.discard(run)
        gc.collect()
        assert made.allocated_bytes() == settled
    weights = made.weight_bytes()
    assert made.unload() == 0
    assert settled - torch.cuda.memory_allocated() >= weights * 0.95
