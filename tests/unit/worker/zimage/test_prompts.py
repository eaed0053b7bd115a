"""A prompt is encoded once, as long as its embedding fits into what may be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from tests.unit.worker.zimage.checkpoints import PICO
from worker import pico
from worker.pipelines.base import ImageRequest, Tuning
from worker.pipelines.zimage import Pipeline
from worker.zimage import prompts as module
from worker.zimage.parts import Parts, load_parts
from worker.zimage.prompts import Prompts, omni_pieces

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = "a fox in the snow " * 200


@pytest.fixture(scope="module")
def parts(one_thread: None) -> Parts:
    return load_parts(PICO, "cpu")


@pytest.fixture
def reads(parts: Parts) -> Any:
    """The lengths of the texts that reach the text encoder."""
    lengths: list[int] = []
    hook = parts.text_encoder.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    yield lengths
    hook.remove()


def make(parts: Parts, max_bytes: int, max_tokens: int = 128) -> Prompts:
    return Prompts(parts.tokenizer, parts.text_encoder, max_tokens=max_tokens, device="cpu", max_bytes=max_bytes)


def encode(prompts: Prompts, text: str) -> Tensor:
    with torch.inference_mode():
        return prompts.encode(text, "prompt", [])


def test_a_prompt_is_what_the_stock_pipeline_makes_of_it(parts: Parts) -> None:
    stock: Any = ZImagePipeline.from_pretrained(pico.FOLDER, local_files_only=True, dtype=torch.float32)
    prompts = make(parts, 1 << 20)
    for text in ("a red circle", "左边红色圆形", "", LONG):
        with torch.inference_mode():
            (expected,), _ = stock.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=128)
        for _ in range(2):  # read, then found
            assert torch.allclose(encode(prompts, text), expected, atol=1e-5)


def test_the_same_text_is_read_once(parts: Parts, reads: list[int]) -> None:
    prompts = make(parts, 1 << 20)
    first, again, other = (encode(prompts, text) for text in ("a red circle", "a red circle", "a red  circle"))
    assert len(reads) == 2
    assert again is first
    assert prompts.counters() == {"embeds_hits": 1, "embeds_misses": 2, "embeds_bytes": first.nbytes + other.nbytes}


def test_the_pieces_of_an_edit_are_kept_apart_from_plain_prompts(parts: Parts, reads: list[int]) -> None:
    prompts = make(parts, 1 << 20)
    with torch.inference_mode():
        plain = prompts.encode("make it blue", "prompt", [])
        pieces = prompts.encode_pieces("make it blue", "prompt", [], pictures=2)
        again = prompts.encode_pieces("make it blue", "prompt", [], pictures=2)
    assert [len(omni_pieces("x", pictures)) for pictures in (0, 1, 2)] == [1, 3, 4]
    assert len(pieces) == 4
    assert all(piece is kept for piece, kept in zip(pieces, again, strict=True))
    assert all(piece is not plain for piece in pieces)
    assert len(reads) == 5


def test_the_one_used_last_stays(parts: Parts, reads: list[int]) -> None:
    size = encode(make(parts, 0), "a red circle").nbytes
    prompts = make(parts, 2 * size)
    for text in ("a red circle", "a blue circle", "a red circle", "a red square", "a red circle", "a blue circle"):
        assert encode(prompts, text).nbytes == size, "the texts of this test are of one length"
    assert prompts.counters() == {"embeds_hits": 2, "embeds_misses": 4, "embeds_bytes": 2 * size}


def test_never_more_is_kept_than_may_be(parts: Parts) -> None:
    limit = 150_000
    prompts = make(parts, limit)
    for count in range(60):
        encode(prompts, "a red circle " * (count % 7) + str(count))
        assert 0 < prompts.counters()["embeds_bytes"] <= limit
    assert prompts.counters()["embeds_bytes"] == sum(kept.states.nbytes for kept in prompts._kept.values())


@pytest.mark.parametrize("max_bytes", [0, 1000])
def test_what_does_not_fit_is_not_kept(parts: Parts, reads: list[int], max_bytes: int) -> None:
    prompts = make(parts, max_bytes)
    assert torch.equal(encode(prompts, "a red circle"), encode(prompts, "a red circle"))
    assert len(reads) == 2
    assert prompts.counters() == {"embeds_hits": 0, "embeds_misses": 2, "embeds_bytes": 0}


def test_tokens_are_counted_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTS", 2)
    asked: list[str] = []

    def tokenize(text: str, **options: Any) -> Any:
        asked.append(text)
        return parts.tokenizer(text, **options)

    prompts = Prompts(tokenize, parts.text_encoder, max_tokens=128, device="cpu")
    assert [prompts.count(text) for text in ("", "", LONG, LONG)] == [0, 0, 128, 128]
    assert prompts.count("a red circle") == len(parts.tokenizer("a red circle").input_ids)
    assert asked == ["", LONG, "a red circle"]
    prompts.count("")
    assert asked[3:] == [""], "the oldest is forgotten"
    assert "fox" not in repr(vars(prompts))


def test_a_prompt_that_is_cut_is_told_of_each_time(parts: Parts, reads: list[int]) -> None:
    prompts = make(parts, 1 << 20)
    told: list[str] = []
    for what in ("prompt", "prompt", "negative prompt"):
        prompts.encode(LONG, what, told)
    assert reads == [128]
    assert [text.split(" is ")[0] for text in told] == ["The prompt", "The prompt", "The negative prompt"]
    assert told[0] == told[1]
    assert " 1" in told[0] and "128" in told[0]


def test_no_prompt_stays_in_memory(parts: Parts) -> None:
    prompts = make(parts, 1 << 20)
    encode(prompts, "my secret")
    assert [len(key) for key in prompts._kept] == [32]
    assert "secret" not in repr(vars(prompts))


def test_an_embedding_that_is_evicted_stays_with_its_run() -> None:
    pipeline = Pipeline(PICO, device="cpu", tuning=Tuning(embeds_bytes=20_000))
    pipeline.load()

    def start(prompt: str) -> Any:
        return pipeline.start(
            ImageRequest(prompt=prompt, width=64, height=64, steps=2, guidance_scale=2.0, seed=1, negative_prompt="x")
        )

    def finish(run: Any) -> Any:
        while not run.done:
            pipeline.step([run])
        return pipeline.finish(run)

    expected = finish(start("a red circle"))
    run = start("a red circle")
    for number in range(8):
        pipeline.discard(start(f"{number} blue squares"))
    assert len(pipeline._prompts._kept) < 8
    assert (finish(run) == expected).all()
    assert pipeline.counters()["embeds_hits"] > 0
