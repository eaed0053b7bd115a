"""A preview shows, from the first step on, what the picture is going to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.unit.worker.zimage.checkpoints import PICO
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline
from worker.zimage.previews import Previews, predicted, samples

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "a red circle left of a green square on a grey background",
    "左边红色圆形，右边绿色正方形，灰色背景",
    "a blue triangle on a white background",
    "a yellow star above a purple square on a black background",
)
CORRELATION = 0.85  # with the picture in small; measured 0.876 to 0.976 over these prompts and all of their steps
BETTER_DB = 3.0  # than a picture all of its mean grey; measured 4.3 to 11.3 after the last step


@pytest.fixture(scope="module")
def pipeline(one_thread: None) -> Pipeline:
    made = Pipeline(PICO, device="cpu")
    made.load()
    return made


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other.astype(float)).mean()))


def ask(prompt: str, **changes: Any) -> ImageRequest:
    fields: dict[str, Any] = {"width": 128, "height": 128, "steps": 8, "guidance_scale": 0.0, "seed": 3}
    return ImageRequest(prompt=prompt, **(fields | changes))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["grey", "zh", "white", "black"])
@pytest.mark.parametrize(("width", "height"), [(128, 128), (256, 192)])
def test_a_preview_looks_like_the_picture(pipeline: Pipeline, prompt: str, width: int, height: int) -> None:
    run = pipeline.start(ask(prompt, width=width, height=height, seed=PROMPTS.index(prompt)))
    previews = []
    while not run.done:
        pipeline.step([run])
        previews.append(pipeline.preview(run))
    picture = pipeline.finish(run).reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    for preview in previews:
        assert preview is not None
        assert (preview.shape, preview.dtype) == ((height // 8, width // 8, 3), np.uint8)
        assert np.corrcoef(preview.ravel(), picture.ravel())[0, 1] >= CORRELATION
    grey = np.full_like(picture, picture.mean())
    assert psnr(previews[-1], picture) >= psnr(grey, picture) + BETTER_DB  # type: ignore[arg-type]


def test_a_preview_with_guidance_looks_like_the_picture(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(PROMPTS[0], guidance_scale=2.0, negative_prompt="blurry"))
    pipeline.step([run])
    early = pipeline.preview(run)
    while not run.done:
        pipeline.step([run])
    picture = pipeline.finish(run).reshape(16, 8, 16, 8, 3).mean((1, 3))
    assert early is not None
    assert np.corrcoef(early.ravel(), picture.ravel())[0, 1] >= 0.75  # measured 0.828, after one step of eight


def test_before_the_first_step_and_after_the_end_there_is_none(pipeline: Pipeline) -> None:
    run = pipeline.start(ask(PROMPTS[0]))
    assert pipeline.preview(run) is None
    pipeline.step([run])
    pipeline.discard(run)
    assert pipeline.preview(run) is None


def test_a_preview_changes_nothing(pipeline: Pipeline) -> None:
    pictures = []
    for looked_at in (False, True):
        run = pipeline.start(ask(PROMPTS[1], steps=3))
        while not run.done:
            pipeline.step([run])
            if looked_at:
                pipeline.preview(run)
        pictures.append(pipeline.finish(run))
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (64, 64, (8, 8)),
        (1024, 1024, (128, 128)),
        (2048, 1024, (64, 128)),
        (1040, 2048, (128, 65)),
        (4096, 16, (1, 128)),
    ],
)
def test_no_side_is_longer_than_128(pipeline: Pipeline, width: int, height: int, size: tuple[int, int]) -> None:
    array = Previews(pipeline._parts.vae, "cpu").draw(torch.zeros(16, 1, height // 8, width // 8))
    assert array.shape == (*size, 3)
    assert array.flags.c_contiguous


def test_the_map_is_fitted_once_and_is_the_same_each_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = pipeline._parts.vae
    encoded: list[int] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _module, args: encoded.append(len(args[0])))
    decoder = vae.decoder.register_forward_pre_hook(lambda *_: pytest.fail("a preview decodes nothing"))
    try:
        drawn = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        one, other = Previews(vae, "cpu"), Previews(vae, "cpu")
        assert encoded == []
        first = one.draw(drawn)
        assert sum(encoded) == len(samples())
        assert (one.draw(drawn) == first).all()
        assert sum(encoded) == len(samples())
        assert (other.draw(drawn) == first).all()
    finally:
        hook.remove()
        decoder.remove()


def test_clean_latents_are_found_along_the_last_step() -> None:
    noise, clean = torch.randn(2, 16, 1, 8, 8).unbind()

    def at(sigma: float) -> torch.Tensor:
        return sigma * noise + (1 - sigma) * clean

    found = predicted(at(0.6), at(0.9), sigma=0.6, delta=0.6 - 0.9)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted(at(0.0), at(0.3), sigma=0.0, delta=-0.3), clean, atol=1e-5, rtol=0)
