"""The stock pipeline serves what diffusers' own call draws: for Z-Image, and for another architecture altogether."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
)
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import worker
from common.errors import DeviceFailed, LoraUnusable, ModelLoadFailed, OutOfMemory, PipelineFailed
from common.models import BUILT_IN, ModelSpec
from worker import pico
from worker.pipelines.base import ImageRequest, Lora, Run
from worker.pipelines.stock import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(worker.__path__[0]).parent
PICO = next(spec for spec in BUILT_IN if spec.name == "pico-stock")
PROMPT = "a red circle left of a green square"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "stepwise"] == []


def load(source: str | Path = "builtin", **changes: Any) -> Pipeline:
    fields = PICO.model_dump() | {"source": str(source)} | changes
    made = Pipeline(ModelSpec.model_validate(fields), device="cpu")
    made.load()
    return made


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load()


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights, a few thousand, as a folder on disk."""
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = len(words) - 1
    made = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=ends - 1, eos_token_id=ends, pad_token_id=ends,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=AutoencoderKL(
            sample_size=64, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("diffusion")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(diffusion: Path) -> Pipeline:
    return load(diffusion)


def ask(**changes: Any) -> ImageRequest:
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "guidance_scale": 0.0, "seed": 1}
    return ImageRequest(prompt=PROMPT, **(fields | changes))


def complete(pipeline: Pipeline, *runs: Run) -> list[NDArray[np.uint8]]:
    while active := [run for run in runs if not run.done]:
        pipeline.step(active)
    arrays = [pipeline.finish(run) for run in runs]
    for run in runs:
        pipeline.discard(run)
    return arrays


def picture(pipeline: Pipeline, request: ImageRequest) -> NDArray[np.uint8]:
    return complete(pipeline, pipeline.start(request))[0]


def own_call(stock: Any, request: ImageRequest, **arguments: Any) -> NDArray[np.uint8]:
    """Return what the library's pipeline draws when it is simply called."""
    stock.set_progress_bar_config(disable=True)
    image = stock(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **arguments,
    ).images[0]
    return np.asarray(image)


REQUESTS = [
    ask(),
    ask(seed=2, width=96, steps=1),
    ask(seed=3, guidance_scale=4.0, negative_prompt="grey", cfg_normalization=1.0, cfg_truncation=0.5),
    ask(seed=4, height=80, guidance_scale=2.5, steps=5),
]


def test_interleaved_runs_equal_the_calls_of_z_image(pipeline: Pipeline) -> None:
    stock = ZImagePipeline.from_pretrained(pico.FOLDER, local_files_only=True, dtype=torch.float32)
    runs = [pipeline.start(request) for request in REQUESTS]
    for request, mine in zip(REQUESTS, complete(pipeline, *runs), strict=True):
        cfg = {"cfg_normalization": request.cfg_normalization, "cfg_truncation": request.cfg_truncation}
        np.testing.assert_array_equal(mine, own_call(stock, request, max_sequence_length=PICO.max_tokens, **cfg))


def test_interleaved_runs_equal_the_calls_of_another_architecture(other: Pipeline, diffusion: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None)
    runs = [other.start(request) for request in REQUESTS]
    for request, mine in zip(REQUESTS, complete(other, *runs), strict=True):
        np.testing.assert_array_equal(mine, own_call(stock, request))
        assert mine.std() > 5


@pytest.mark.parametrize(
    ("scheduler", "callbacks"),
    [
        (DDIMScheduler, 5),
        (DPMSolverMultistepScheduler, 5),
        (EulerAncestralDiscreteScheduler, 5),  # draws noise at every step, from the run's own generator
        (HeunDiscreteScheduler, 9),
        (PNDMScheduler, 14),
    ],
)
def test_a_scheduler_may_count_otherwise(
    other: Pipeline, diffusion: Path, monkeypatch: pytest.MonkeyPatch, scheduler: Any, callbacks: int
) -> None:
    config = other._pipeline.scheduler.config
    monkeypatch.setattr(other._pipeline, "scheduler", scheduler.from_config(config))
    run = other.start(ask(steps=5, guidance_scale=2.0))
    seen = [0]
    while not run.done:
        other.step([run])
        seen.append(run.step)
    assert len(seen) == callbacks + 1
    assert seen == sorted(seen) and seen[-1] == 5
    stock = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None)
    stock.scheduler = scheduler.from_config(config)
    np.testing.assert_array_equal(complete(other, run)[0], own_call(stock, run.request))


class Made:
    """An output of a call: so many pictures, for the tests whose call is not a real one."""

    nsfw_content_detected: Any = None

    def __init__(self, *shape: int) -> None:
        self.images = np.full((1, *shape), 0.5, np.float32)


def called(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Have a library's pipeline do this when it is called."""

    def call(self: Any, callback_on_step_end: Any = None, **arguments: Any) -> Any:
        return function(self, lambda: callback_on_step_end(self, 0, torch.tensor(0), {}), **arguments)

    monkeypatch.setattr(type(pipeline._pipeline), "__call__", call)


@pytest.mark.parametrize(("callbacks", "known"), [(0, 3), (2, 3), (2, None), (7, 3), (7, None), (7, 0)])
def test_a_call_with_fewer_or_more_callbacks_than_it_said_ends_all_the_same(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, callbacks: int, known: int | None
) -> None:
    made: list[int] = []

    def call(self: Any, step: Any, **_: Any) -> Made:
        self._num_timesteps = known
        for index in range(callbacks):
            made.append(index)
            step()
        return Made(64, 64, 3)

    called(pipeline, monkeypatch, call)
    run = pipeline.start(ask(steps=3))
    for _ in range(20):
        if run.done:
            break
        pipeline.step([run])
    assert run.step == 3
    assert complete(pipeline, run)[0].shape == (64, 64, 3)
    assert len(made) == callbacks


def test_a_run_that_is_done_is_left_as_it_is(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(steps=1))
    pipeline.step([run])
    pipeline.step([run])
    assert run.done
    np.testing.assert_array_equal(complete(pipeline, run)[0], picture(pipeline, ask(steps=1)))


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_canceled_run_leaves_neither_thread_nor_tensors(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    held: list[weakref.ref[Any]] = []
    kinds = type(pipeline._pipeline)
    prepare = kinds.prepare_latents

    def watched(*arguments: Any) -> Any:
        latents = prepare(*arguments)
        held.append(weakref.ref(latents))
        return latents

    monkeypatch.setattr(kinds, "prepare_latents", watched)
    threads = threading.active_count()
    run = pipeline.start(ask())
    for _ in range(steps):
        pipeline.step([run])
    assert threading.active_count() == threads + bool(steps)
    pipeline.discard(run)
    pipeline.discard(run)
    assert threading.active_count() == threads
    gc.collect()
    assert len(held) == bool(steps) and not [ref for ref in held if ref() is not None]
    with pytest.raises(ValueError, match="discarded"):
        pipeline.step([run])
    with pytest.raises(ValueError, match="discarded"):
        pipeline.finish(run)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFailed),
        (ZeroDivisionError("no"), ZeroDivisionError),
        (SystemExit(3), SystemExit),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_in_a_call_is_told_by_its_name_and_fails_it_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[BaseException], at: int
) -> None:
    def fail(self: Any, step: Any, **_: Any) -> None:
        for _index in range(at):
            step()
        raise error

    healthy = pipeline.start(ask(seed=2))
    pipeline.step([healthy])
    with monkeypatch.context() as patch:
        called(pipeline, patch, fail)
        broken = pipeline.start(ask(steps=2))
        for _ in range(min(at, 1)):
            pipeline.step([broken])
        if at == 2:
            pipeline.step([broken])
        for _ in range(2):  # a batch that failed is stepped again, each run alone
            with pytest.raises(kind):
                pipeline.finish(broken) if broken.done else pipeline.step([broken])
        pipeline.discard(broken)
    np.testing.assert_array_equal(complete(pipeline, healthy)[0], picture(pipeline, ask(seed=2)))


def test_a_batch_that_fails_can_be_stepped_run_by_run(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [pipeline.start(ask(steps=1)), pipeline.start(ask(steps=2, seed=2)), pipeline.start(ask(seed=3))]
    assert isinstance(runs[1], Run)
    pipeline.discard(runs[1])
    with pytest.raises(ValueError, match="discarded"):
        pipeline.step(runs)
    for run in (runs[0], runs[2]):
        pipeline.step([run])
    first, third = complete(pipeline, runs[0], runs[2])
    np.testing.assert_array_equal(first, picture(pipeline, ask(steps=1)))
    np.testing.assert_array_equal(third, picture(pipeline, ask(seed=3)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Made(64, 96, 3), "array of"),
        (Made(64, 64, 1), "array of"),
        (object(), "made no picture"),
    ],
)
def test_what_is_no_picture_as_asked_for_fails(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, output: Any, message: str
) -> None:
    called(pipeline, monkeypatch, lambda *_, **__: output)
    with pytest.raises(PipelineFailed, match=message):
        picture(pipeline, ask())
    for call in tuple(pipeline._calls):
        call.stop()


def test_values_that_are_not_numbers_and_withheld_pictures_fail(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, withheld = Made(64, 64, 3), Made(64, 64, 3)
    broken.images[0, 5] = np.nan
    withheld.nsfw_content_detected = [True]
    for output, message in ((broken, "not numbers"), (withheld, "safety checker withheld")):
        called(pipeline, monkeypatch, lambda *_, output=output, **__: output)
        with pytest.raises(PipelineFailed, match=message):
            picture(pipeline, ask())


def test_only_what_the_call_takes_is_passed(other: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = other._arguments(ask(guidance_scale=2.0))
    assert set(asked) == {
        "prompt", "width", "height", "num_inference_steps", "guidance_scale", "generator", "output_type"
    }  # fmt: skip


def test_options_are_further_arguments(diffusion: Path) -> None:
    request = ask(guidance_scale=2.0)
    stock = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None)
    mine = picture(load(diffusion, options={"guidance_rescale": 0.7, "guidance_scale": 9.0}), request)
    np.testing.assert_array_equal(mine, own_call(stock, request, guidance_rescale=0.7))
    assert not np.array_equal(mine, own_call(stock, request))
    assert load(options={"max_sequence_length": 64})._arguments(request)["max_sequence_length"] == 64
    assert load(max_tokens=512)._arguments(request)["max_sequence_length"] == 512
    for option in ("guidance_rescales", "prompt"):
        with pytest.raises(ModelLoadFailed, match=f"StableDiffusionPipeline has no such argument: {option}"):
            load(diffusion, options={option: 1})


def test_loras_and_pictures_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(LoraUnusable, match="loras: model pico-stock takes none"):
        pipeline.start(ask(loras=(Lora(Path("a.safetensors"), 1.0),)))
    array = np.zeros((64, 64, 3), np.uint8)
    for name in ("init_image", "mask_image", "control_image"):
        with pytest.raises(PipelineFailed, match="from text alone"):
            pipeline.start(ask(**{name: array}))
    with pytest.raises(PipelineFailed, match="from text alone"):
        pipeline.start(ask(reference_images=(array,)))
    with pytest.raises(TypeError, match="not started by this pipeline"):
        pipeline.step([Run(request=ask())])


def test_a_call_without_a_step_callback_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadFailed, match=r"DDPMPipeline cannot be called with prompt, callback_on_step_end.*choose"
    ):
        load(tmp_path)


def test_modes_it_does_not_have_are_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="text alone"):
        load(modes=("text", "image"))


def test_a_checkpoint_with_code_of_its_own_is_refused(diffusion: Path, tmp_path: Path) -> None:
    index = (diffusion / "model_index.json").read_text().replace('"StableDiffusionPipeline"', '["mine", "Mine"]')
    (tmp_path / "model_index.json").write_text(index)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ModelLoadFailed, match="without code of its own"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="there is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(ModelLoadFailed, match="folder or hub id of a text-to-image checkpoint"):
        load(tmp_path)


def test_pickled_weights_are_not_loaded(diffusion: Path, tmp_path: Path) -> None:
    made = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None)
    made.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ModelLoadFailed, match="safetensors"):
        load(tmp_path)


def test_unloading_ends_its_calls_and_leaves_no_weights(diffusion: Path) -> None:
    made = load(diffusion)
    parameters = [p for part in (made._pipeline.unet, made._pipeline.vae) for p in part.parameters()]
    assert made.weight_bytes() > sum(p.nbytes for p in parameters) > 1000
    del parameters
    run = made.start(ask())
    made.step([run])
    assert made.unload() == 0
    made.discard(run)


def test_weights_that_somebody_still_holds_are_counted(diffusion: Path) -> None:
    made = load(diffusion)
    keeper = made._pipeline.vae
    left = made.unload()
    assert left == sum(tensor.nbytes for tensor in (*keeper.parameters(), *keeper.buffers()))


def test_a_process_ends_with_suspended_runs() -> None:
    program = (
        "from common.models import BUILT_IN\n"
        "from worker.pipelines.base import ImageRequest\n"
        "from worker.pipelines.stock import Pipeline\n"
        "spec = next(spec for spec in BUILT_IN if spec.name == 'pico-stock')\n"
        "pipeline = Pipeline(spec, device='cpu')\n"
        "pipeline.load()\n"
        "asked = dict(prompt='x', width=64, height=64, steps=4, guidance_scale=0.0)\n"
        "runs = [pipeline.start(ImageRequest(**asked, seed=seed)) for seed in range(3)]\n"
        "pipeline.step(runs)\n"
        "print('suspended', [run.step for run in runs], flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "suspended [1, 1, 1]\n"
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr
