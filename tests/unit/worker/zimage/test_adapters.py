"""A run with LoRAs draws what the stock pipeline draws with them, to 1e-4, whatever LoRAs other runs have."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.hooks import apply_group_offloading
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from common.errors import LoraUnusable, OutOfMemory
from common.models import BUILT_IN
from tests.unit.worker.zimage.lorafiles import ATTENTION, PICO_SHAPES, Form, write_lora
from worker import pico
from worker.pipelines import zimage as module
from worker.pipelines.base import ImageRequest, Lora, Run
from worker.pipelines.zimage import Pipeline
from worker.zimage.adapters import Adapters

pytestmark = pytest.mark.usefixtures("one_thread")

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
TOLERANCE = 1e-4  # of values in 0..1
PROMPT = "a red circle left of a green square on a grey background"


def load() -> Pipeline:
    made = Pipeline(PICO, device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def shared() -> Pipeline:
    return load()


@pytest.fixture
def pipeline(shared: Pipeline) -> Pipeline:
    """A pipeline that has seen no LoRA yet."""
    shared._parts.transformer.unload_lora()
    shared._adapters = Adapters(shared._parts.transformer)
    return shared


@pytest.fixture(scope="module")
def stock() -> Any:
    made = ZImagePipeline.from_pretrained(pico.FOLDER, local_files_only=True, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def ask(*loras: Lora, **changes: Any) -> ImageRequest:
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 0.0, "seed": 1}
    return ImageRequest(prompt=PROMPT, loras=loras, **(fields | changes))


def reference(stock: Any, request: ImageRequest) -> NDArray[np.float32]:
    names = [f"a{index}" for index, _ in enumerate(request.loras)]
    for name, lora in zip(names, request.loras, strict=True):
        stock.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=name)
    if names:
        stock.set_adapters(names, [lora.scale for lora in request.loras])
    try:
        picture: NDArray[np.float32] = stock(
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
    finally:
        stock.unload_lora_weights()
    return picture


def interleaved(pipeline: Pipeline, requests: list[ImageRequest]) -> list[NDArray[np.float32]]:
    """Advance requests as an engine does, each batch key's runs in turn by one step; return their pictures."""
    runs = [pipeline.start(request) for request in requests]
    while active := [run for run in runs if not run.done]:
        for key in dict.fromkeys(pipeline.batch_key(run) for run in active):
            pipeline.step([run for run in active if pipeline.batch_key(run) == key])
    pictures = [pipeline.decode(run).numpy() for run in runs]
    for run in runs:
        pipeline.discard(run)
    return pictures


def picture(pipeline: Pipeline, *loras: Lora, **changes: Any) -> NDArray[np.float32]:
    return interleaved(pipeline, [ask(*loras, **changes)])[0]


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def wrapped(pipeline: Pipeline) -> bool:
    return any("lora" in name or "base_layer" in name for name, _ in pipeline._parts.transformer.named_modules())


@pytest.mark.parametrize("form", ["diffusers", "comfy", "kohya", "fused"])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_form_equals_the_stock_pipeline(
    pipeline: Pipeline, stock: Any, tmp_path: Path, form: Form, alpha: float | None
) -> None:
    if form == "diffusers" and alpha:
        form, alpha = "comfy", 8.0  # diffusers' own keys have no alphas
    request = ask(Lora(write_lora(tmp_path / "style.safetensors", form=form, alpha=alpha), 0.8))
    mine = interleaved(pipeline, [request])[0]
    assert difference(mine, reference(stock, request)) <= TOLERANCE
    assert difference(mine, picture(pipeline)) > 0.02


def test_the_scaling_in_a_files_header_counts(pipeline: Pipeline, stock: Any, tmp_path: Path) -> None:
    config = {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.3.attention.to_k": 1}, "rank_pattern": {},
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "megatron_core": "this", "init_lora_weights": True,
    }  # fmt: skip
    path = write_lora(tmp_path / "trained.safetensors", config=config)
    request = ask(Lora(path, 1.0))
    mine = interleaved(pipeline, [request])[0]
    assert difference(mine, reference(stock, request)) <= TOLERANCE
    assert difference(mine, picture(pipeline, Lora(write_lora(tmp_path / "plain.safetensors"), 1.0))) > 0.02


def test_ranks_may_differ_between_layers(pipeline: Pipeline, stock: Any, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "mixed.safetensors", layers=["attention.to_q"], rank=4)
    wide = load_file(write_lora(tmp_path / "wide.safetensors", 2, layers=["attention.to_v", "feed_forward.w1"], rank=9))
    save_file(load_file(path) | wide, path)
    request = ask(Lora(path, -0.7))
    assert difference(interleaved(pipeline, [request])[0], reference(stock, request)) <= TOLERANCE


def test_runs_with_other_loras_and_with_none_never_mix(pipeline: Pipeline, stock: Any, tmp_path: Path) -> None:
    first = write_lora(tmp_path / "first.safetensors", 1)
    second = write_lora(tmp_path / "second.safetensors", 2, rank=8, layers=[*ATTENTION, "feed_forward.w1"])
    requests = [
        ask(Lora(first, 1.0), steps=4),
        ask(steps=3),
        ask(Lora(second, 0.5), width=96, seed=2),
        ask(Lora(first, 1.0), Lora(second, -0.5), steps=3, guidance_scale=2.0, negative_prompt="grey"),
        ask(Lora(second, -0.5), Lora(first, 1.0), height=80, seed=3),
        ask(Lora(first, 0.25), steps=1),
        ask(Lora(first, 1.0), seed=4, guidance_scale=3.0),
    ]
    for request, mine in zip(requests, interleaved(pipeline, requests), strict=True):
        assert difference(mine, reference(stock, request)) <= TOLERANCE, request


def test_only_runs_with_equal_loras_may_share_a_step(pipeline: Pipeline, tmp_path: Path) -> None:
    path, other = (write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    runs = [
        pipeline.start(ask(*loras))
        for loras in (
            [], [Lora(path, 1.0)], [Lora(path, 0.5)], [Lora(other, 1.0)], [Lora(path, 1.0), Lora(other, 1.0)]
        )
    ]  # fmt: skip
    assert len({pipeline.batch_key(run) for run in runs}) == len(runs)
    with pytest.raises(ValueError, match="different LoRAs"):
        pipeline.step(runs[:2])
    assert [run.step for run in runs] == [0] * len(runs)
    swapped = pipeline.start(ask(Lora(other, 1.0), Lora(path, 1.0)))
    assert pipeline.batch_key(swapped) == pipeline.batch_key(runs[-1])
    pipeline.step([swapped, runs[-1]])


def test_without_a_lora_the_transformer_is_as_it_was_loaded(pipeline: Pipeline, tmp_path: Path) -> None:
    transformer = pipeline._parts.transformer
    modules = list(transformer.modules())
    picture(pipeline)
    assert not wrapped(pipeline)
    assert all(one is other for one, other in zip(modules, transformer.modules(), strict=True))
    held = pipeline.start(ask(Lora(write_lora(tmp_path / "a.safetensors"), 1.0)))
    assert wrapped(pipeline)
    pipeline.discard(held)


def test_switching_back_is_exact(pipeline: Pipeline, tmp_path: Path) -> None:
    before = picture(pipeline)
    loras = [Lora(write_lora(tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in (1, 2, 3)]
    first = picture(pipeline, loras[0])
    np.testing.assert_array_equal(picture(pipeline), before)
    picture(pipeline, *loras)
    np.testing.assert_array_equal(picture(pipeline, loras[0]), first)
    np.testing.assert_array_equal(picture(pipeline), before)
    assert difference(first, before) > 0.02


def test_an_unchanged_blend_costs_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    blend = pipeline._adapters.hold([Lora(write_lora(tmp_path / "a.safetensors"), 1.0)], [])
    pipeline._adapters.activate(blend)
    pipeline._adapters._layers = [None]  # which it would trip over
    pipeline._adapters.activate(blend)


def limited(pipeline: Pipeline, **limits: int) -> Adapters:
    pipeline._adapters = Adapters(pipeline._parts.transformer, **limits)
    return pipeline._adapters


def loaded(pipeline: Pipeline) -> set[str]:
    return {version.path.stem for version in pipeline._adapters._kept}


def test_the_least_recently_used_is_evicted(pipeline: Pipeline, tmp_path: Path) -> None:
    adapters = limited(pipeline, max_count=2)
    one, two, three = (Lora(write_lora(tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in (1, 2, 3))
    first, second = picture(pipeline, one), picture(pipeline, two)
    picture(pipeline, one)
    picture(pipeline, three)
    assert loaded(pipeline) == {"1", "3"}
    assert len(pipeline._parts.transformer.peft_config) == len(adapters._kept) == 2
    np.testing.assert_array_equal(picture(pipeline, two), second)
    np.testing.assert_array_equal(picture(pipeline, one), first)


def test_bytes_are_bounded_as_well(pipeline: Pipeline, tmp_path: Path) -> None:
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2, 3)]
    weights = sum(tensor.nbytes for tensor in load_file(paths[0]).values())
    adapters = limited(pipeline, max_bytes=int(2.5 * weights))
    for path in paths:
        picture(pipeline, Lora(path, 1.0))
    assert (loaded(pipeline), adapters.nbytes) == ({"2", "3"}, 2 * weights)
    big = Lora(write_lora(tmp_path / "big.safetensors", rank=32), 1.0)
    with pytest.raises(LoraUnusable, match=r"LoRA big has \d+ MiB; at most \d+ fit"):
        picture(pipeline, big)


def test_what_a_run_holds_is_not_evicted(pipeline: Pipeline, tmp_path: Path) -> None:
    limited(pipeline, max_count=1)
    one, two, three = (Lora(write_lora(tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in (1, 2, 3))
    expected = picture(pipeline, one, two)
    assert loaded(pipeline) == {"1", "2"}  # a task's own LoRAs stand beside each other
    run = pipeline.start(ask(one, two))
    pipeline.step([run])
    picture(pipeline, three)
    assert loaded(pipeline) == {"1", "2", "3"}
    pipeline.step([run])
    np.testing.assert_array_equal(pipeline.decode(run).numpy(), expected)
    pipeline.discard(run)
    picture(pipeline, one)
    assert loaded(pipeline) == {"1", "2", "3"}  # only a file that comes anew needs room
    picture(pipeline, Lora(write_lora(tmp_path / "4.safetensors", 4), 1.0))
    assert loaded(pipeline) == {"4"}


def test_evicting_the_last_unwraps_the_transformer(pipeline: Pipeline, tmp_path: Path) -> None:
    limited(pipeline, max_count=1)
    before = picture(pipeline)
    path = write_lora(tmp_path / "a.safetensors")
    picture(pipeline, Lora(path, 1.0))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors")
    with pytest.raises(LoraUnusable):
        picture(pipeline, Lora(broken, 1.0))
    assert loaded(pipeline) == {"a"}  # a file that cannot be used takes nobody's room
    pipeline._adapters._make_room(1 << 40, ())
    assert not wrapped(pipeline)
    assert pipeline._adapters.nbytes == 0
    np.testing.assert_array_equal(picture(pipeline), before)
    picture(pipeline, Lora(path, 1.0))


def test_what_no_run_holds_can_be_evicted_and_is_reckoned_with(pipeline: Pipeline, tmp_path: Path) -> None:
    held, idle = (Lora(write_lora(tmp_path / f"{name}.safetensors"), 1.0) for name in ("held", "idle"))
    gone = Lora(tmp_path / "gone.safetensors", 1.0)
    size = idle.path.stat().st_size
    before = pipeline.peak_bytes([ask(idle)])
    assert before - pipeline.peak_bytes([ask(gone)]) == pytest.approx(1.1 * size, abs=2)
    run = pipeline.start(ask(held))
    picture(pipeline, idle)
    assert pipeline.peak_bytes([ask(held), ask(idle)]) == pipeline.peak_bytes([ask(), ask()])
    pipeline.evict()
    assert loaded(pipeline) == {"held"}
    assert pipeline.counters()["embeds_bytes"] == 0
    assert pipeline.counters()["loras_bytes"] == pytest.approx(size, rel=0.05)
    assert pipeline.peak_bytes([ask(idle)]) == before
    pipeline.step([run])
    pipeline.discard(run)
    pipeline.evict()
    assert (loaded(pipeline), pipeline.counters()["loras_bytes"], wrapped(pipeline)) == (set(), 0, False)


def test_evicted_weights_are_free(pipeline: Pipeline, tmp_path: Path) -> None:
    limited(pipeline, max_count=1)
    picture(pipeline, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))
    gc.collect()
    count = sum(parameter.numel() for parameter in pipeline._parts.transformer.parameters())
    picture(pipeline, Lora(write_lora(tmp_path / "b.safetensors", 2), 1.0))
    assert sum(parameter.numel() for parameter in pipeline._parts.transformer.parameters()) == count


def test_a_replaced_file_is_read_anew_and_runs_under_way_keep_the_old_one(
    pipeline: Pipeline, stock: Any, tmp_path: Path
) -> None:
    lora = Lora(write_lora(tmp_path / "style.safetensors", 1), 1.0)
    old = picture(pipeline, lora)
    run = pipeline.start(ask(lora))
    pipeline.step([run])
    write_lora(tmp_path / "new.safetensors", 2).replace(lora.path)
    new = pipeline.start(ask(lora))
    assert pipeline.batch_key(new) != pipeline.batch_key(run)
    pipeline.step([new])
    pipeline.step([run])
    pipeline.step([new])
    np.testing.assert_array_equal(pipeline.decode(run).numpy(), old)
    assert difference(pipeline.decode(new).numpy(), reference(stock, ask(lora))) <= TOLERANCE


def test_a_file_that_is_written_over_in_place_harms_no_run(pipeline: Pipeline, tmp_path: Path) -> None:
    lora = Lora(write_lora(tmp_path / "style.safetensors", 1), 1.0)
    old = picture(pipeline, lora)
    run = pipeline.start(ask(lora))
    with lora.path.open("r+b") as file:
        file.truncate(100)
    pipeline.step([run])
    pipeline.step([run])
    np.testing.assert_array_equal(pipeline.decode(run).numpy(), old)


def test_a_file_that_is_still_being_written_is_refused(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lora(tmp_path / "style.safetensors", 1)
    convert = ZImagePipeline.lora_state_dict

    def append(*arguments: Any) -> Any:
        path.write_bytes(path.read_bytes() + b"more")
        return convert(*arguments)

    monkeypatch.setattr(ZImagePipeline, "lora_state_dict", append)
    with pytest.raises(LoraUnusable, match="was written to while it was read"):
        picture(pipeline, Lora(path, 1.0))
    assert not wrapped(pipeline)


SQUARE = torch.ones(192, 192)
KEY = "transformer.layers.0.attention.to_q"
FAR = "transformer.layers.29.attention.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "none of its tensors is for this model"),
        ({"weight": SQUARE}, "none of its tensors is for this model"),
        ({"layers.0.attention.to_q.lora_A.weight": SQUARE}, "none of its tensors is for this model"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": SQUARE}, "none of its tensors is for this model"),
        ({"lora_te_layers_0_q_proj.lora_down.weight": SQUARE}, "none of its tensors is for this model"),
        ({"unet.down.lora_A.weight": SQUARE, "unet.down.lora_B.weight": SQUARE}, "none of its tensors is for this"),
        ({f"{KEY}.weight": SQUARE}, "is no part of a LoRA"),
        ({f"{KEY}.lora_A.weight": SQUARE}, "has no counterpart"),
        ({f"{KEY}.lora_B.weight": SQUARE}, "has no counterpart"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 3840), f"{KEY}.lora_B.weight": torch.ones(3840, 4)}, "takes 3840"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 192), f"{KEY}.lora_B.weight": torch.ones(3840, 4)}, "gives 3840"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 192), f"{KEY}.lora_B.weight": torch.ones(192, 8)}, "has rank 8"),
        ({f"{KEY}.lora_A.weight": torch.ones(192), f"{KEY}.lora_B.weight": torch.ones(192)}, "1 dimensions"),
        ({f"{FAR}.lora_A.weight": SQUARE, f"{FAR}.lora_B.weight": SQUARE}, r"no linear layer layers\.29\.attention"),
        ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": SQUARE}, "no known form"),
        ({"diffusion_model.layers.0.norm.weight": SQUARE}, "no known form"),
        ({f"{KEY}.dora_scale": SQUARE}, "only plain LoRA"),
        ({f"{KEY}.lora_magnitude_vector": SQUARE}, "only plain LoRA"),
        ({f"{KEY}.lokr_w1": SQUARE}, "only plain LoRA"),
        ({f"{KEY}.lora_A.weight": SQUARE * float("nan"), f"{KEY}.lora_B.weight": SQUARE}, "not numbers"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_fails_alone(
    pipeline: Pipeline, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "odd.safetensors")
    before = picture(pipeline)
    other = pipeline.start(ask())
    pipeline.step([other])
    with pytest.raises(LoraUnusable, match=f"LoRA odd.*{message}") as caught:
        pipeline.start(ask(Lora(tmp_path / "odd.safetensors", 1.0)))
    assert not caught.value.retryable
    assert not wrapped(pipeline)
    assert len(pipeline._adapters._kept) == 0
    pipeline.step([other])
    np.testing.assert_array_equal(pipeline.decode(other).numpy(), before)


def test_a_bad_lora_beside_good_ones_leaves_those(pipeline: Pipeline, tmp_path: Path) -> None:
    good = Lora(write_lora(tmp_path / "good.safetensors"), 1.0)
    expected = picture(pipeline, good)
    (tmp_path / "bad.safetensors").write_bytes(os.urandom(3000))
    for bad in ("bad", "gone"):
        with pytest.raises(LoraUnusable, match=f"LoRA {bad}.*cannot be read"):
            pipeline.start(ask(good, Lora(tmp_path / f"{bad}.safetensors", 1.0)))
    np.testing.assert_array_equal(picture(pipeline, good), expected)
    assert len(pipeline._adapters._kept) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"lora_alpha": "much"},
        {"r": True},
        {"r": 3},
        {"rank_pattern": {"layers.0.*": 77}},
        {"rank_pattern": {"(([a-z_0-9.])+)+!": 4}},  # as a regular expression it would run for ever
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"to_k": "much"}},
        {"use_rslora": 1},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(pipeline: Pipeline, tmp_path: Path, config: dict[str, object]) -> None:
    good, bad = write_lora(tmp_path / "good.safetensors"), write_lora(tmp_path / "bad.safetensors", config=config)
    with pytest.raises(LoraUnusable, match="LoRA bad"):
        pipeline.start(ask(Lora(bad, 1.0)))
    assert not wrapped(pipeline)
    expected = picture(pipeline, Lora(good, 1.0))
    with pytest.raises(LoraUnusable, match="LoRA bad"):
        pipeline.start(ask(Lora(bad, 1.0)))
    np.testing.assert_array_equal(picture(pipeline, Lora(good, 1.0)), expected)
    assert len(pipeline._adapters._kept) == 1


@pytest.mark.parametrize("header", ["[]", "3", "{", '{"transformer.r": '])
def test_a_header_that_is_no_json_object_is_refused(pipeline: Pipeline, tmp_path: Path, header: str) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    save_file(load_file(path), path, {"lora_adapter_metadata": header})
    with pytest.raises(LoraUnusable, match="scaling in its header"):
        pipeline.start(ask(Lora(path, 1.0)))


def test_no_room_on_the_device_is_told_as_such(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    before = picture(pipeline)
    load_adapter = type(pipeline._parts.transformer).load_lora_adapter

    def fill(transformer: Any, *arguments: Any, **options: Any) -> None:
        load_adapter(transformer, *arguments, **options)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline._parts.transformer), "load_lora_adapter", fill)
        with pytest.raises(OutOfMemory):
            pipeline.start(ask(Lora(path, 1.0)))
    assert not wrapped(pipeline)
    np.testing.assert_array_equal(picture(pipeline), before)
    picture(pipeline, Lora(path, 1.0))


def test_a_transformer_that_is_offloaded_takes_none(tmp_path: Path) -> None:
    offloaded = load()
    cpu = torch.device("cpu")
    apply_group_offloading(offloaded._parts.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    before = picture(offloaded)
    with pytest.raises(LoraUnusable, match="GPU is too small for LoRAs"):
        picture(offloaded, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))
    np.testing.assert_array_equal(picture(offloaded), before)


def test_a_part_for_the_text_encoder_is_left_out_with_a_warning(pipeline: Pipeline, stock: Any, tmp_path: Path) -> None:
    text = {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 128)}
    request = ask(Lora(write_lora(tmp_path / "both.safetensors", extra=text), 1.0))
    for _ in range(2):  # read, and kept
        run: Run = pipeline.start(request)
        assert run.warnings == ["LoRA both also has a part for the text encoder, which was left out."]
    save_file({k: v for k, v in load_file(request.loras[0].path).items() if k not in text}, request.loras[0].path)
    assert difference(picture(pipeline, *request.loras), reference(stock, request)) <= TOLERANCE


def test_weights_take_the_transformers_dtype(tmp_path: Path) -> None:
    transformer = load()._parts.transformer.to(torch.bfloat16)
    adapters = Adapters(transformer)
    path = write_lora(tmp_path / "a.safetensors", layers=list(PICO_SHAPES))
    adapters.activate(adapters.hold([Lora(path, 1.0)], []))
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert adapters.nbytes * 2 == sum(tensor.nbytes for tensor in load_file(path).values())


def test_nothing_records_gradients(pipeline: Pipeline, tmp_path: Path) -> None:
    run = pipeline.start(ask(Lora(write_lora(tmp_path / "a.safetensors"), 1.0)))
    pipeline.step([run])
    assert not any(
        parameter.requires_grad for name, parameter in pipeline._parts.transformer.named_parameters() if "lora_" in name
    )
    assert not any(parameter.is_inference() for parameter in pipeline._parts.transformer.parameters())


def test_unloading_the_model_takes_its_loras_along(tmp_path: Path) -> None:
    made = load()
    plain = made.weight_bytes()
    picture(made, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))
    assert made.weight_bytes() == plain + made._adapters.nbytes
    assert made.unload() == 0


def test_what_loras_take_is_a_level_that_any_thread_may_ask_for(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(pipeline, Lora(write_lora(tmp_path / "a.safetensors"), 1.0))
    assert pipeline.counters()["loras_bytes"] == pipeline._adapters.nbytes > 0
    made, asked = load(), list[Any]()
    traces = module.Traces
    monkeypatch.setattr(module, "Traces", lambda models: (asked.append(made.counters()), traces(models))[1])
    assert made.unload() == 0
    assert (asked, made.counters()) == ([{}], {}), "as another thread asks while the model is let go"
