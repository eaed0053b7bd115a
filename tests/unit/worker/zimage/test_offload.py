"""What waits in the machine's memory: chosen by sizes, and without a trace in the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.hooks.group_offloading import ModuleGroup
from structlog.testing import capture_logs
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from tests.unit.worker.zimage import checkpoints
from tests.unit.worker.zimage.checkpoints import PICO, spec_of
from worker.pipelines.base import ImageRequest, Tuning
from worker.pipelines.zimage import Pipeline
from worker.zimage import offload
from worker.zimage.memory import peak_bytes
from worker.zimage.offload import Choice, Waiting
from worker.zimage.parts import Parts, load_parts
from worker.zimage.shape import Shape, shape_of
from worker.zimage.skeletons import empty_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

GB = 10**9
GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def real() -> dict[str, nn.Module]:
    """Z-Image in its full size, without weights."""
    with torch.device("meta"):
        return {
            "transformer": ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
            "text_encoder": empty_text_encoder(
                Qwen3Model,
                Qwen3Config(
                    vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                ),
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
        }  # fmt: skip


def test_the_sizes_of_the_real_model(real: dict[str, nn.Module]) -> None:
    sizes = {name: sum(weight.numel() for weight in model.parameters()) * 2 for name, model in real.items()}
    assert sizes["transformer"] == pytest.approx(12.31 * GB, rel=0.01)
    assert sizes["text_encoder"] == pytest.approx(7.84 * GB, rel=0.01)
    assert sizes["vae"] == pytest.approx(0.168 * GB, rel=0.01)


# free memory of a GPU sold as so many GB, driver and CUDA context taken off: a third of a GiB and more
@pytest.mark.parametrize(
    ("gpu_gib", "chosen"),
    [(7.6, "all"), (11.5, "all"), (13.8, "all"), (14.3, "encoders"), (15.5, "encoders"), (19.6, "encoders"),
     (21.2, "encoders"), (21.7, "none"), (23.4, "none"), (79.0, "none"), (139.0, "none")],
)  # fmt: skip
def test_as_little_waits_as_the_gpu_allows(
    real: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch, gpu_gib: float, chosen: Choice
) -> None:
    """With the GPU's memory patched in; tests/gpu has a real one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gpu_gib * GIB), int(gpu_gib * GIB) + GIB // 2))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    with capture_logs() as lines:
        waiting = offload.choose_for("turbo", real, device="cuda", dtype=torch.bfloat16, tuning=Tuning())
    assert waiting.choice == chosen
    (line,) = lines
    assert (line["event"], line["choice"], line["wanted"]) == ("offload_chosen", chosen, "auto")
    assert line["gpu_mb"] == int(gpu_gib * GIB) // MIB
    assert [line[f"{name}_mb"] for name in ("transformer", "text_encoder", "vae")] == [11739, 7479, 159]
    assert line["needed_mb"] == pytest.approx(22_196, abs=3)


@pytest.mark.parametrize("wanted", ["none", "encoders", "all"])
@pytest.mark.parametrize("available", [0, 12 * GB, 80 * GB])
def test_what_the_operator_chose_is_done(wanted: Choice, available: int) -> None:
    assert offload.choose(wanted, steady=12 * GB, encoders=8 * GB, available=available) == wanted


def test_a_limit_counts_as_the_gpu_and_other_models_of_ours_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 20 * GB)
    assert offload.available_bytes(Tuning()) == 23 * GB
    assert offload.available_bytes(Tuning(memory_bytes=16 * GB)) == 16 * GB
    assert offload.available_bytes(Tuning(memory_bytes=80 * GB)) == 23 * GB


def test_the_bounds_are_met_to_the_byte() -> None:
    need = offload.FORWARD + offload.MARGIN
    for spare, chosen in ((0, "none"), (-1, "encoders")):
        assert offload.choose("auto", steady=12 * GB, encoders=8 * GB, available=20 * GB + need + spare) == chosen
    for spare, chosen in ((0, "encoders"), (-1, "all")):
        assert offload.choose("auto", steady=12 * GB, encoders=8 * GB, available=12 * GB + need + spare) == chosen


@pytest.mark.parametrize("wanted", ["auto", "none", "encoders", "all"])
def test_on_a_cpu_nothing_waits(wanted: Any) -> None:
    with capture_logs() as lines:
        waiting = offload.choose_for("pico", {}, device="cpu", dtype=torch.float32, tuning=Tuning(offload=wanted))
    assert (waiting.choice, lines) == ("none", [])


@pytest.mark.parametrize(
    ("choice", "waiting"),
    [
        ("none", set()),
        ("encoders", {"text_encoder", "vae", "siglip"}),
        ("all", {"text_encoder", "vae", "siglip", "transformer", "controlnet"}),
    ],
)
def test_who_waits(choice: Choice, waiting: set[str]) -> None:
    parts = ("text_encoder", "vae", "siglip", "transformer", "controlnet")
    assert {part for part in parts if Waiting(choice).waits(part)} == waiting


def streamed(model: nn.Module) -> set[str]:
    """The modules whose weights come and go."""
    return {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}


def pictures(pipeline: Pipeline) -> Iterator[Any]:
    requests = [
        ImageRequest(
            prompt=prompt, width=width, height=80, steps=3, guidance_scale=guidance, seed=4, negative_prompt="blurry"
        )
        for prompt, width, guidance in (("a red circle", 64, 0.0), ("a blue square", 96, 2.0))
    ]
    runs = [pipeline.start(request) for request in requests]
    for _ in range(3):
        pipeline.step(runs)
    for run in runs:
        yield pipeline.preview(run)
        yield pipeline.finish(run)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each weight that came or went, which is copied then, as from one memory to another.

    The CPU stands for both places here; tests/gpu moves weights for real.
    """
    moved: list[int] = []

    def copy(tensor: torch.Tensor) -> None:
        moved.append(tensor.nbytes)
        tensor.data = tensor.data.clone()

    def go(group: Any) -> None:
        weights = [weight for module in group.modules for weight in module.parameters()]
        for weight in (*weights, *group.parameters, *group.buffers):
            copy(weight)

    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", lambda _self, tensor, *_: copy(tensor))
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", go)
    return moved


@pytest.mark.parametrize("choice", ["encoders", "all"])
def test_pictures_are_the_same_whatever_waits(choice: Choice, moves: list[int]) -> None:
    plain, waiting = Pipeline(PICO, device="cpu"), Pipeline(PICO, device="cpu")
    plain.load()
    parts = load_parts(PICO, "cpu")
    offload.apply(parts.models(), Waiting(choice), device="cpu")
    waiting.adopt(parts)
    for mine, theirs in zip(pictures(waiting), pictures(plain), strict=True):
        # a value here and there rounds the other way: weights at other addresses are multiplied by other kernels
        assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
    assert sum(moves) > plain.weight_bytes() / 2
    assert waiting.weight_bytes() == plain.weight_bytes()


@pytest.mark.parametrize("choice", ["encoders", "all"])
def test_what_comes_and_goes_is_dropped_with_the_model(choice: Choice, moves: list[int]) -> None:
    waiting = Pipeline(PICO, device="cpu")
    parts: Parts | None = load_parts(PICO, "cpu")
    assert parts is not None
    offload.apply(parts.models(), Waiting(choice), device="cpu")
    waiting.adopt(parts)
    del parts
    list(pictures(waiting))
    assert waiting.unload() == 0


def test_the_estimate_counts_the_weights_that_come_for_a_call() -> None:
    parts = load_parts(PICO, "cpu")
    plain = shape_of(parts)
    assert (plain.transformer.streamed, plain.text_encoder.streamed) == (0, 0)
    offload.apply(parts.models(), Waiting("all"), device="cpu")
    shape = shape_of(parts)
    block = sum(weight.nbytes for weight in parts.transformer.layers[0].parameters())
    leaves = [leaf for leaf in parts.text_encoder.modules() if not [*leaf.children()]]
    largest = sorted(sum(weight.nbytes for weight in leaf.parameters()) for leaf in leaves)[-2:]
    assert (shape.transformer.streamed, shape.text_encoder.streamed) == (2 * block, sum(largest))
    request = ImageRequest(prompt="", width=64, height=64, steps=1, guidance_scale=0.0, seed=1)

    def estimate(shape: Shape) -> int:
        return peak_bytes(shape, [request] * 8, count=len, tile_above=1 << 20, device="cpu")

    assert estimate(shape) == pytest.approx(estimate(plain) + 1.1 * 2 * block, abs=2)


def test_every_weight_either_comes_and_goes_or_stays(tmp_path: Path) -> None:
    control = checkpoints.controlnet(tmp_path / "control")
    parts = load_parts(spec_of("builtin", controlnet=str(control)), "cpu")
    offload.apply(parts.models(), Waiting("all"), device="cpu")
    assert streamed(parts.transformer) == {f"layers.{number}" for number in range(6)}
    assert streamed(parts.controlnet) == {"control_layers.0", "control_layers.1"}
    assert {"encoder.conv_in", "decoder.conv_out"} <= streamed(parts.vae)
    assert {"embed_tokens", "layers.1.mlp.down_proj", "layers.0.self_attn.q_norm"} <= streamed(parts.text_encoder)
    # what the ControlNet shares with the transformer is called by either, so it stays
    assert not streamed(parts.controlnet.noise_refiner) | streamed(parts.controlnet.context_refiner)


def test_what_sees_pictures_comes_and_goes_too(tmp_path: Path) -> None:
    parts = load_parts(spec_of(checkpoints.omni(tmp_path / "omni")), "cpu")
    inputs = {
        "pixel_values": torch.rand(1, 12, 768), "pixel_attention_mask": torch.ones(1, 12, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[3, 4]]),
    }  # fmt: skip
    with torch.inference_mode():
        before = parts.siglip(**inputs).last_hidden_state
        offload.apply(parts.models(), Waiting("encoders"), device="cpu")
        assert torch.equal(parts.siglip(**inputs).last_hidden_state, before)
    assert streamed(parts.siglip)
