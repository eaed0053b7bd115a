"""The folder of LoRAs: only safetensors files right inside it can be named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import InvalidRequest, UnknownLora
from common.loras import LoraChoice
from worker.loras import available, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two LoRAs and much that is none; beside it, a LoRA that is out of bounds."""
    folder = tmp_path / "loras"
    (folder / "inner.safetensors").mkdir(parents=True)
    (folder / "below").mkdir()
    for name in ("ink.safetensors", "Soft-Light_2.1.safetensors", "pickled.bin", "pickled.pt", "notes.txt", "bare"):
        (folder / name).touch()
    for name in (
        ".hidden.safetensors",
        "-dash.safetensors",
        "two words.safetensors",
        "a\n.safetensors",
        "ß.safetensors",
    ):
        (folder / name).touch()
    (folder / f"{'x' * 65}.safetensors").touch()
    (folder / "upper.SAFETENSORS").touch()
    (folder / "below" / "deep.safetensors").touch()
    (tmp_path / "outside.safetensors").touch()
    (folder / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "climbing.safetensors").symlink_to(Path("..", "outside.safetensors"))
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "looping.safetensors").symlink_to("looping.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    return folder


def choose(*names: str) -> list[LoraChoice]:
    return [LoraChoice.model_construct(name=name, scale=0.5) for name in names]


def test_only_regular_safetensors_files_right_inside_count(folder: Path) -> None:
    assert available(folder) == ("Soft-Light_2.1", "ink")
    (found,) = resolve(folder, choose("ink"))
    assert (found.path, found.scale) == (folder.resolve() / "ink.safetensors", 0.5)


def test_a_link_within_the_folder_is_an_alias(folder: Path) -> None:
    (folder / "brush.safetensors").symlink_to("ink.safetensors")
    (folder / "deeper.safetensors").symlink_to(Path("below", "deep.safetensors"))
    assert available(folder) == ("Soft-Light_2.1", "brush", "deeper", "ink")


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert available(tmp_path / "current") == ("Soft-Light_2.1", "ink")


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "outside", "linked", "climbing", "dangling", "looping", "pipe", "below/deep", "inner", "pickled",
        "notes", "ink.safetensors", "INK", "", ".", "..", ".hidden", "ink\x00", "ink\n", "x" * 65, "upper",
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_with_what_is(folder: Path, name: str) -> None:
    with pytest.raises(UnknownLora) as caught:
        resolve(folder, choose("ink", name))
    assert caught.value.code == "unknown_lora"
    assert isinstance(caught.value, InvalidRequest) and not caught.value.retryable
    ((loc, msg),) = caught.value.errors
    assert loc == "loras.1.name"
    assert msg == f"this worker has no LoRA {name!r}; there are: Soft-Light_2.1, ink"
    assert str(folder) not in caught.value.message


def test_the_same_name_twice_is_refused(folder: Path) -> None:
    with pytest.raises(UnknownLora, match="loras: names must differ"):
        resolve(folder, choose("ink", "Soft-Light_2.1", "ink"))


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for folder in (None, tmp_path / "missing", tmp_path / "file", tmp_path / "round"):
        assert available(folder) == ()
        assert resolve(folder, ()) == ()
        with pytest.raises(UnknownLora, match=r"no LoRA 'ink'; there are none \(see ZFLEET_LORA_DIR\)"):
            resolve(folder, choose("ink"))


def test_files_come_and_go_without_a_restart(folder: Path) -> None:
    (folder / "new.safetensors").touch()
    assert [lora.path.stem for lora in resolve(folder, choose("new", "ink"))] == ["new", "ink"]
    (folder / "ink.safetensors").unlink()
    assert available(folder) == ("Soft-Light_2.1", "new")
