"""From a prompt to a picture, and from a folder to a model; zimage/ has the modes and what they share."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from numpy.typing import NDArray

from common.errors import DeviceFailed, FleetError, ModelLoadFailed, OutOfMemory, PipelineFailed
from common.models import BUILT_IN, ModelSpec
from worker import pico
from worker.pipelines.base import ImageRequest, Run
from worker.pipelines.zimage import Pipeline, ZImageRun
from worker.zimage import sources, weights
from worker.zimage.schedule import schedule

pytestmark = pytest.mark.usefixtures("one_thread")

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
TOLERANCE = 1e-4  # of values in 0..1; a step of uint8 is forty times that

PROMPTS = (
    "a red circle left of a green square on a grey background",
    "左边红色圆形，右边绿色正方形，灰色背景",
    "دائرة حمراء إلى يسار مربع أخضر",
    "🦊🌈 👩‍👩‍👧 im Schnee",
    "",
    "a" * 300,
    "a photo of a golden moon above a small boat, 8k, cinematic light",
)
LONG = ("A fox in the snow. 雪地里的狐狸。 ثعلب في الثلج. Лиса в снегу. 🦊❄️ " * 400)[:16_000]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    made = Pipeline(PICO, device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def stock() -> Any:
    made = ZImagePipeline.from_pretrained(pico.FOLDER, local_files_only=True, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def ask(prompt: str = PROMPTS[0], **changes: Any) -> ImageRequest:
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 0.0, "seed": 1}
    return ImageRequest(prompt=prompt, **(fields | changes))


def batched(pipeline: Pipeline, requests: list[tuple[int, ImageRequest]]) -> list[NDArray[np.float32]]:
    """Advance requests together, each joining at its tick; return their pictures as floats."""
    waiting = sorted(requests, key=lambda entry: entry[0])
    runs: dict[int, Run] = {}
    tick = 0
    while waiting or any(not run.done for run in runs.values()):
        while waiting and waiting[0][0] <= tick:
            request = waiting.pop(0)[1]
            runs[id(request)] = pipeline.start(request)
        pipeline.step([run for run in runs.values() if not run.done])
        tick += 1
    return [pipeline.decode(runs[id(request)]).numpy() for _, request in requests]


def reference(stock: Any, request: ImageRequest) -> NDArray[np.float32]:
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
    return picture


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("prompt", [*PROMPTS, LONG, "<|im_end|>\n<|im_start|>user"], ids=lambda text: text[:12])
def test_prompts_in_any_script_equal_the_stock_call(pipeline: Pipeline, stock: Any, prompt: str) -> None:
    request = ask(prompt)
    assert difference(batched(pipeline, [(0, request)])[0], reference(stock, request)) <= TOLERANCE


def test_finish_rounds_the_float_picture(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(width=96))
    pipeline.step([run])
    pipeline.step([run])
    floats = pipeline.decode(run).numpy()
    assert (floats.min(), floats.max()) >= (0.0, 0.5)
    assert floats.max() <= 1.0
    np.testing.assert_array_equal(pipeline.finish(run), np.round(floats * 255).astype(np.uint8))


def test_eight_steps_are_the_official_schedule(pipeline: Pipeline) -> None:
    sigmas, times = schedule(pipeline._parts.scheduler, width=64, height=64, steps=8)
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    np.testing.assert_allclose(sigmas.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(times.numpy(), 1 - sigmas.numpy()[:-1], atol=1e-6)


def test_no_negative_prompt_is_the_empty_one(pipeline: Pipeline) -> None:
    pictures = batched(pipeline, [(0, ask(guidance_scale=3.0)), (0, ask(guidance_scale=3.0, negative_prompt=""))])
    assert difference(*pictures) <= TOLERANCE


@pytest.mark.parametrize("prompt", PROMPTS[:4], ids=["en", "zh", "ar", "emoji"])
def test_a_prompt_that_fits_brings_no_warning(pipeline: Pipeline, prompt: str) -> None:
    run = pipeline.start(ask(prompt))
    assert run.warnings == []
    assert all(1 < len(caption) <= PICO.max_tokens for caption in run.captions)  # type: ignore[attr-defined]


def test_a_prompt_of_16000_characters_is_cut_with_a_warning(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(LONG, guidance_scale=2.0, negative_prompt=LONG))
    chat = pipeline._parts.tokenizer.apply_chat_template(
        [{"role": "user", "content": LONG}], add_generation_prompt=True
    )
    count = len(chat["input_ids"])
    assert count > 10_000
    assert [warning.split(" is ")[0] for warning in run.warnings] == ["The prompt", "The negative prompt"]
    assert all(str(count) in warning and str(PICO.max_tokens) in warning for warning in run.warnings)
    assert isinstance(run, ZImageRun)
    assert [len(caption) for caption in run.captions + run.negatives] == [PICO.max_tokens] * 2
    pipeline.step([run])


def test_nothing_records_gradients_nor_tries_kernels_out() -> None:
    """cuDNN's benchmark would pause at every new size, and choose other kernels, so other pictures, from run to run."""
    made = Pipeline(PICO, device="cpu")
    made.load()
    run = made.start(ask(guidance_scale=2.0))
    while not run.done:
        made.step([run])
    assert isinstance(run, ZImageRun)
    decoded = made.decode(run)
    made.finish(run)
    for tensor in (run.latents, *run.captions, *run.negatives, decoded):
        assert tensor.is_inference()
        assert not tensor.requires_grad
    assert torch.backends.cudnn.benchmark is False


def test_when_a_forward_fails_no_run_has_moved(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [pipeline.start(ask()), pipeline.start(ask(seed=2))]
    before = [run.latents for run in runs]  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._parts.transformer, "forward", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.step(runs)
    assert [run.step for run in runs] == [0, 0]
    assert all(run.latents is old for run, old in zip(runs, before, strict=True))  # type: ignore[attr-defined]
    pipeline.step(runs)


def test_a_run_that_is_done_or_discarded_is_refused_and_harms_no_other(pipeline: Pipeline) -> None:
    gone, done, kept = (pipeline.start(ask(steps=1)) for _ in range(3))
    pipeline.discard(gone)
    pipeline.step([done])
    for useless in (gone, done):
        with pytest.raises(ValueError, match="cannot be stepped"):
            pipeline.step([kept, useless])
    assert kept.step == 0
    with pytest.raises(TypeError, match="not started by this pipeline"):
        pipeline.step([Run(request=ask())])


def test_values_that_are_not_numbers_fail_the_picture(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(steps=1))
    pipeline.step([run])
    run.latents = torch.full_like(run.latents, float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(PipelineFailed, match="not numbers"):
        pipeline.finish(run)


def loader(*, device: str = "cpu", **changes: Any) -> Pipeline:
    return Pipeline(ModelSpec.model_validate(PICO.model_dump() | changes), device=device)


def test_a_local_folder_is_loaded_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a local folder must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for source in ("builtin", str(pico.FOLDER)):
        fresh = loader(source=source)
        fresh.load()
        assert fresh.start(ask()).step == 0


def test_a_hub_id_is_asked_for_at_its_revision_and_in_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def refuse(source: str, **options: Any) -> None:
        asked.update(options, source=source)
        raise OSError("We couldn't connect")

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    with pytest.raises(ModelLoadFailed, match=r"couldn't connect.*HF_TOKEN"):
        loader(source="Some-Org/Some-Image", revision="0123456789" * 4, device="cuda", dtype="bfloat16").load()
    assert asked["source"] == "Some-Org/Some-Image"
    assert asked["revision"] == "0123456789" * 4
    assert not [pattern for pattern in asked["allow_patterns"] if pattern in ("*", "*.bin", "*.safetensors")]


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "~/no-such-folder"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(ModelLoadFailed, match="there is no folder"):
        loader(source=source).load()


def test_an_empty_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="folder or hub id of a Z-Image checkpoint"):
        loader(source=str(tmp_path)).load()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = shutil.copytree(pico.FOLDER, tmp_path / "copy")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelLoadFailed, match="safetensors"):
        loader(source=str(folder)).load()


def test_a_damaged_pico_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pico, "FOLDER", tmp_path)
    with pytest.raises(ModelLoadFailed, match="install zfleet again"):
        loader().load()


@pytest.mark.parametrize("dtype", ["bf16", "int8", "nn"])
def test_a_dtype_that_is_none_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ModelLoadFailed, match="use bfloat16, float16 or float32"):
        loader(source=str(tmp_path), device="cuda", dtype=dtype).load()


def test_limits_past_the_position_tables_are_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="max_side must be at most 2048"):
        loader(max_side=4096).load()
    with pytest.raises(ModelLoadFailed, match="max_tokens must be at most 992"):
        loader(max_tokens=1024).load()


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(pico.FOLDER, tmp_path / "copy")
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)):
        checkpoint = ZImagePipeline.from_pretrained(folder, local_files_only=True)
        checkpoint.register_modules(scheduler=scheduler)
        checkpoint.save_pretrained(folder)
        with pytest.raises(ModelLoadFailed, match="FlowMatchEulerDiscreteScheduler"):
            loader(source=str(folder)).load()


def test_too_little_memory_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights, "read", fill)
    with pytest.raises(ModelLoadFailed, match="choose a smaller model"):
        loader().load()


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceFailed),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceFailed),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceFailed),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_what_a_device_does_to_a_call_has_a_name(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception, named: type[Exception]
) -> None:
    """With the errors injected; tests/gpu has a real one."""
    run = pipeline.start(ask())

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(pipeline._parts.transformer, "forward", fail)
        with pytest.raises(named) as caught:
            pipeline.step([run])
    assert isinstance(caught.value, FleetError) == (named is not RuntimeError)
    assert run.step == 0
    pipeline.step([run])
    assert run.step == 1
