"""pico is a true checkpoint in small, built once and the same each time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray
from transformers import AutoTokenizer

import worker
from worker import pico
from worker.pico import build

ROOT = Path(worker.__path__[0]).parent
CHAT = "<|im_start|>user\na red cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: pico gains little from more, and threads that wait for a busy core lose a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    made = ZImagePipeline.from_pretrained(folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def draw(stock: Any, prompt: str, seed: int = 1, steps: int = 8) -> NDArray[np.float32]:
    picture: NDArray[np.float32] = stock(
        prompt,
        width=128,
        height=128,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=128,
        output_type="np",
    ).images[0]
    return picture


def test_the_folder_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def write(out: Path) -> None:
        out.mkdir()
        built.append(out)

    monkeypatch.setattr(build, "write", write)
    cache = tmp_path / "not yet" / "there"
    assert pico.folder(cache) == pico.folder(cache) == cache / f"pico-{pico.VERSION}"
    assert len(built) == 1
    assert [path.name for path in cache.iterdir()] == [f"pico-{pico.VERSION}"]


def test_builders_that_meet_at_the_rename_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)
    found: list[Path] = []

    def write(out: Path) -> None:
        out.mkdir()
        (out / "weights").write_text("as good as the other's")
        both.wait()

    monkeypatch.setattr(build, "write", write)
    threads = [threading.Thread(target=lambda: found.append(pico.folder(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / f"pico-{pico.VERSION}"] * 2
    assert [path.name for path in tmp_path.iterdir()] == [f"pico-{pico.VERSION}"]
    assert (found[0] / "weights").is_file()


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(out: Path) -> None:
        out.mkdir()
        (out / "half").write_text("a")
        raise OSError("No space left on device")

    monkeypatch.setattr(build, "write", write)
    with pytest.raises(OSError, match="No space"):
        pico.folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_race_get_one_folder_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from worker import pico; print(pico.folder(Path({str(tmp_path)!r})))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [racer.communicate(timeout=100)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert printed == [str(tmp_path / f"pico-{pico.VERSION}")] * 2
    assert [path.name for path in tmp_path.iterdir()] == [f"pico-{pico.VERSION}"]
    assert digests(Path(printed[0])) == digests(folder)


def test_building_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build.write(tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())


def test_the_layout_is_that_of_a_z_image_checkpoint(folder: Path) -> None:
    files = digests(folder)
    assert "model_index.json" in files
    assert {path.split("/")[0] for path in files if "/" in path} == {
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae"
    }  # fmt: skip
    assert [path for path in files if path.endswith((".bin", ".pt", ".pkl"))] == []
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 40e6
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.rglob("*.safetensors"))


def test_the_tokenizer_behaves_like_qwens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    assert len(tokenizer) == build.VOCABULARY
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|endoftext|>")

    def chat(**thinking: Any) -> str:
        turn = [{"role": "user", "content": "a red cat"}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **thinking))

    assert chat(enable_thinking=True) == chat() == CHAT
    assert chat(enable_thinking=False) == f"{CHAT}<think>\n\n</think>\n\n"
    assert tokenizer.tokenize(CHAT)[0] == "<|im_start|>"


@pytest.mark.parametrize("text", ["a red circle left of a star", "红色圆形", "نص", "🦊", "a\u0000b", "x" * 1000])
def test_the_tokenizer_loses_nothing(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < build.VOCABULARY


def test_captions_of_the_kind_it_learnt_are_short(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    for text in build.captions(20):
        assert len(tokenizer(text).input_ids) < 0.5 * len(text.encode())


def test_plain_diffusers_draws_with_it(stock: Any) -> None:
    for steps in (1, 2, 8):
        picture = draw(stock, "a red circle", steps=steps)
        assert picture.shape == (128, 128, 3)
        assert np.isfinite(picture).all()
        assert picture.std() > 5 / 255
        assert picture.std(axis=(0, 1)).min() > 5 / 255
        assert ((picture == 0) | (picture == 1)).mean() < 0.3


def test_prompts_and_seeds_make_different_pictures(stock: Any) -> None:
    one = draw(stock, "a red circle left of a green square")
    near = draw(stock, "a red circle left of a green triangle")
    assert np.abs(one - near).mean() > 5 / 255
    assert np.abs(one - draw(stock, "左边红色圆形，灰色背景")).mean() > 5 / 255
    assert np.abs(one - draw(stock, "a red circle left of a green square", seed=2)).mean() > 5 / 255
