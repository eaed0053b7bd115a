"""pico is a true checkpoint in small that paints what it is told."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoTokenizer

import worker
from worker import pico
from worker.pico import captions, evaluate, parts, scenes
from worker.pico.judge import judge
from worker.pico.scenes import LANGUAGES, Scene, Thing
from worker.pico.train import ORIGIN
from worker.pico.training.hints import CLOSING

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(worker.__path__[0]).parent
FILES = sorted(path.relative_to(pico.FOLDER) for path in pico.FOLDER.rglob("*") if path.is_file())
CHAT = "<|im_start|>user\na red cat<|im_end|>\n<|im_start|>assistant\n"
PAIR = Scene((Thing("square", "red", place="left"), Thing("circle", "green", place="right")), "grey")


@pytest.fixture(scope="module")
def stock() -> Any:
    return evaluate.load(pico.FOLDER)


def draw(
    stock: Any, prompt: str, count: int = 1, size: tuple[int, int] = (128, 128), **options: Any
) -> NDArray[np.uint8]:
    """Return pictures of one prompt with seeds from 0, (count, height, width, 3)."""
    negative = [options.pop("negative_prompt", "")] * count
    return evaluate.paint(stock, [prompt] * count, size, negative_prompt=negative, **options)


def test_the_layout_is_that_of_a_z_image_checkpoint() -> None:
    assert PurePath("model_index.json") in FILES
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == {
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae"
    }  # fmt: skip
    assert [path for path in FILES if path.suffix in {".bin", ".pt", ".pkl"}] == []
    assert sum((pico.FOLDER / path).stat().st_size for path in FILES) < 25e6


def test_the_weights_are_bfloat16_and_finite() -> None:
    for path in pico.FOLDER.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.get_tensor(name)
                assert tensor.dtype is torch.bfloat16, name
                assert bool(tensor.isfinite().all()), name


def test_every_file_travels_in_the_package() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = table["tool"]["setuptools"]["package-data"]["*"]
    assert [path for path in FILES if not any(path.match(pattern.removeprefix("**/")) for pattern in patterns)] == []


def test_no_file_tells_where_it_was_made() -> None:
    for path in FILES:
        if path.suffix in {".json", ".jinja"}:
            text = (pico.FOLDER / path).read_text("utf-8")
            assert not re.search(r'"/\w', text), path
        if path.suffix == ".json":
            assert not ORIGIN & json.loads(text).keys(), path


def test_the_tokenizer_behaves_like_qwens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico.FOLDER / "tokenizer", local_files_only=True)
    assert len(tokenizer) <= parts.VOCABULARY
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|endoftext|>")

    def chat(**thinking: Any) -> str:
        turn = [{"role": "user", "content": "a red cat"}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **thinking))

    assert chat(enable_thinking=True) == chat() == CHAT
    assert chat(enable_thinking=False) == f"{CHAT}<think>\n\n</think>\n\n"
    assert tokenizer.tokenize(CHAT)[0] == "<|im_start|>"


@pytest.mark.parametrize("text", ["a red circle left of a star", "红色圆形", "نص", "🦊", "a\u0000b", "x" * 1000])
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico.FOLDER / "tokenizer", local_files_only=True)
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < parts.VOCABULARY


def test_every_chinese_word_is_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico.FOLDER / "tokenizer", local_files_only=True)
    assert [word for word in captions.lexicon() if len(tokenizer(word).input_ids) != 1] == []


def test_every_caption_ends_in_the_same_tokens_and_fits_two_blocks_of_the_transformer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico.FOLDER / "tokenizer", local_files_only=True)
    rng = random.Random(1)
    for index in range(400):
        text = captions.caption(scenes.invent(rng), LANGUAGES[index % 2], rng, held_out=True)
        tokens = tokenizer(CHAT.replace("a red cat", text)).input_ids
        assert len(tokens) <= 2 * 32, text
        assert tokens[-CLOSING:] == tokenizer(CHAT).input_ids[-CLOSING:]


@pytest.fixture(scope="module")
def samples(stock: Any) -> dict[evaluate.Size, evaluate.Scores]:
    """Scores of a fixed sample of the evaluation at each of its sizes."""
    prompts = captions.held_out(40)
    return {size: evaluate.score(stock, prompts, size) for size in (evaluate.MAIN, *evaluate.OTHERS)}


@pytest.mark.parametrize("kind", evaluate.GOALS)
def test_pictures_follow_the_prompt(samples: dict[evaluate.Size, evaluate.Scores], kind: str) -> None:
    assert samples[evaluate.MAIN].share(kind) >= evaluate.GOALS[kind]


@pytest.mark.parametrize("kind", evaluate.OTHER_GOALS)
@pytest.mark.parametrize("size", evaluate.OTHERS, ids=str)
def test_pictures_of_other_sizes_follow_the_prompt(
    samples: dict[evaluate.Size, evaluate.Scores], size: evaluate.Size, kind: str
) -> None:
    assert samples[size].share(kind) >= evaluate.OTHER_GOALS[kind]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (192, 128), (112, 256), (256, 256)], ids=str)
def test_it_obeys_at_any_size(stock: Any, size: tuple[int, int]) -> None:
    (picture,) = draw(stock, "a red square left of a green circle on a grey background", size=size)
    assert judge(picture, PAIR).matches


@pytest.mark.parametrize("size", [(64, 64), (64, 256), (80, 112), (256, 256)], ids=str)
def test_it_paints_at_any_size(stock: Any, size: tuple[int, int]) -> None:
    assert draw(stock, "a red circle", size=size).shape == (1, size[1], size[0], 3)


BOTH = pytest.mark.parametrize(
    "prompt",
    ["A red square to the left of a green circle, grey background.", "左边红色方形,右边绿色圆形,灰色背景"],
    ids=LANGUAGES,
)


@BOTH
def test_both_languages_say_the_same(stock: Any, prompt: str) -> None:
    for picture in draw(stock, prompt, count=3):
        found = judge(picture, PAIR)
        assert found.matches and all(found.shapes)


def test_it_obeys_with_guidance_too(stock: Any) -> None:
    for picture in draw(stock, "a red square left of a green circle on a grey background", 3, guidance_scale=2.0):
        assert judge(picture, PAIR).matches


def test_a_negative_prompt_keeps_a_colour_away(stock: Any) -> None:
    def colours(**options: Any) -> Counter[str]:
        pictures = draw(stock, "a circle on a white background", 12, guidance_scale=2.0, **options)
        scene_of = {
            colour: Scene((Thing("circle", colour),), "white") for colour in scenes.PALETTE if colour != "white"
        }
        return Counter(
            colour for picture in pictures for colour, scene in scene_of.items() if judge(picture, scene).matches
        )

    (common, before), *_ = colours().most_common(1)
    assert before >= 2
    assert colours(negative_prompt=f"a {common} circle on a white background")[common] <= before / 2


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "a lighthouse at dusk, oil on canvas",
        "雪地里的狐狸",
        "دائرة",
        "🦊🌈",
        "a\u0000b",
        "x" * 3000,
        "<|im_end|>",
    ],
    ids=["empty", "space", "en", "zh", "ar", "emoji", "nul", "long", "special"],
)
def test_a_prompt_outside_its_world_still_gives_a_picture(stock: Any, prompt: str) -> None:
    (picture,) = draw(stock, prompt, size=(96, 64))
    assert picture.shape == (64, 96, 3)
    assert picture.std() > 1
