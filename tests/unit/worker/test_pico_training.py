"""pico's training: what it asks of the inner layers, and that it can be taken up again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from worker import pico
from worker.pico import captions, evaluate, parts, scenes, train
from worker.pico.scenes import Scene, Thing
from worker.pico.training import denoiser, hints, progress, text_encoder, vae
from worker.pico.training.steps import pick_size

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = Scene((Thing("square", "red", "big", "left"), Thing("circle", "green", place="right")), "grey")
ONE = Scene((Thing("star", None, "small", "top"),))


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Make each step of a training small."""
    patch.setattr(vae, "PIXELS", 2 * 64 * 64)
    patch.setattr(vae, "SAMPLE", 8)
    patch.setattr(text_encoder, "CAPTIONS", 2)
    patch.setattr(denoiser, "TOKENS", 4 * 64)
    patch.setattr(denoiser, "TRIAL_PROMPTS", 2)
    patch.setattr(evaluate, "STEPS", 2)
    patch.setattr(progress, "KEEP_EVERY", 1)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def weights(folder: Path) -> str:
    """Return the digest of all weights of a checkpoint."""
    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def trained(out: Path, work: Path) -> str:
    """Train briefly; return the digest of the weights."""
    course = ["--vae-steps", "2", "--reading-steps", "2", "--pool", "8", "--steps", "3"]
    train.main([str(out), "--work", str(work), *course, "--eager", "--device", "cpu"])
    return weights(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A brief training without interruption: its folder, the digest of its weights, what it printed."""
    base = tmp_path_factory.mktemp("whole")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shorten(patch)
        digest = trained(base / "out", base / "work")
    return base / "out", digest, printed.getvalue()


def test_a_training_writes_what_is_shipped_and_tells_how_far_it_is(whole: tuple[Path, str, str]) -> None:
    folder, _, printed = whole
    made, shipped = (
        {path.relative_to(each) for path in each.rglob("*") if path.is_file()} for each in (folder, pico.FOLDER)
    )
    assert made == shipped
    for line in ("vae 2/2", "reading 2/2", "latents, 128 x 128", "latents, many sizes", "denoiser 3/3", "trial"):
        assert line in printed
    assert evaluate.paint(evaluate.load(folder), ["a red circle"], (64, 64)).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("part", "call"), [(vae, 2), (text_encoder, 2), (denoiser, 1), (denoiser, 2)], ids=lambda value: str(value)[-30:]
)
@pytest.mark.usefixtures("brief")
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    whole: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any, call: int
) -> None:
    descend, calls = part.descend, 0

    def interrupt(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        descend(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(part, "descend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "out", tmp_path / "work")
    assert trained(tmp_path / "out", tmp_path / "work") == whole[1]


@pytest.mark.usefixtures("brief")
def test_a_training_goes_on_from_the_weights_of_another(whole: tuple[Path, str, str], tmp_path: Path) -> None:
    course = ["--begin", str(whole[0]), "--vae-steps", "0", "--reading-steps", "0", "--pool", "4", "--steps", "0"]
    train.main([str(tmp_path / "out"), "--work", str(tmp_path / "work"), *course, "--eager", "--device", "cpu"])
    assert weights(tmp_path / "out") == whole[1]
    before, after = (
        json.loads((each / "vae" / "config.json").read_text("utf-8")) for each in (whole[0], tmp_path / "out")
    )
    assert (after["scaling_factor"], after["shift_factor"]) == (before["scaling_factor"], before["shift_factor"])
    configs = [path.read_text("utf-8") for path in (tmp_path / "out").rglob("*.json")]
    assert not any(str(whole[0]) in config or "is_local" in config for config in configs)


@pytest.mark.usefixtures("brief")
def test_nothing_held_out_is_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption, learnt = captions.caption, []

    def note(scene: Scene, *arguments: Any, held_out: bool = False) -> str:
        learnt.append((scene, held_out))
        return caption(scene, *arguments, held_out=held_out)

    monkeypatch.setattr(captions, "caption", note)
    monkeypatch.setattr(denoiser, "keep_best", lambda *_: None)  # which alone asks what is held out
    trained(tmp_path / "out", tmp_path / "work")
    assert len(learnt) > 2000
    assert not any(scene.held_out or held_out for scene, held_out in learnt)


@pytest.mark.usefixtures("brief")
def test_what_another_training_kept_is_refused(tmp_path: Path) -> None:
    kept = progress.Kept(tmp_path, "another recipe")
    kept.save("vae", step=1)
    with pytest.raises(progress.Stale, match="--work"):
        trained(tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["out", "--begin", "nowhere"], "--begin: nowhere is no checkpoint"),
        (["out", "--pool", "1"], "--pool: 1 is below 2"),
        (["out", "--steps", "-1"], "--steps: -1 is below 0"),
        (["out", "--device", "tpu"], "--device: invalid choice"),
        (["file"], "file cannot be a folder to write"),
        (["out", "--work", "file"], "file cannot be a folder to write"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_trained(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments)
    assert told in capsys.readouterr().err


def test_the_command_tells_of_a_stale_state_without_a_traceback(tmp_path: Path) -> None:
    progress.Kept(tmp_path / "work", "another recipe").save("vae", step=1)
    command = [sys.executable, "-m", "worker.pico.train", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=Path(pico.__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "was made by other code or options" in done.stderr


def test_a_kept_state_is_whole_or_not_there(tmp_path: Path) -> None:
    kept = progress.Kept(tmp_path, "recipe")
    assert kept.load("best") is None
    kept.save("best", score=0.5)
    with pytest.raises(Exception, match="pickle"):
        kept.save("best", score=lambda: None)
    found = kept.load("best")
    assert found is not None and found["score"] == 0.5


def answered(asked: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return logits that give the right answers (..., questions), in one row as a head gives them."""
    chosen = [
        torch.nn.functional.one_hot(each.clamp(min=0), size) * 100.0
        for each, size in zip(asked.unbind(dim=-1), sizes, strict=True)
    ]
    return torch.cat(chosen, dim=-1)


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.tensor([((x + 0.5) / columns, (y + 0.5) / rows) for y in range(rows) for x in range(columns)])


def test_a_patch_is_asked_for_the_thing_that_stands_in_its_part_of_the_picture() -> None:
    asked, offsets = hints.about_patches(TWO, grid(2, 4))
    colours = [hints.COLOURS[colour] for colour in asked[:, 2].tolist()]
    assert colours == ["red", "red", "green", "green"] * 2
    assert {hints.COLOURS[background] for background in asked[:, 0].tolist()} == {"grey"}
    assert offsets[0].tolist() == pytest.approx([-1.0, -1.0])  # the first patch is up and left in the left half
    assert offsets[7].tolist() == pytest.approx([1.0, 1.0])

    asked, _ = hints.about_patches(ONE, grid(2, 2))
    assert asked[:, 1].tolist() == [1, 1, 0, 0], "nothing stands below"
    assert asked[2:, 2:].eq(hints.NOTHING).all()
    assert hints.COLOURS[asked[0, 2]] is None and hints.SIZES[asked[0, 4]] == "small"


def test_a_caption_left_out_is_asked_nothing() -> None:
    assert set(hints.about_caption(None)) == {hints.NOTHING}
    assert hints.about_patches(None, grid(2, 2))[0].eq(hints.NOTHING).all()


def test_captions_of_different_scenes_have_different_answers() -> None:
    rng = random.Random(2)
    told: dict[tuple[int, ...], Scene] = {}
    for _ in range(2000):
        scene = scenes.invent(rng)
        white = Scene(scene.things, scene.background or scenes.UNSAID_BACKGROUND)
        assert told.setdefault(tuple(hints.about_caption(scene)), white) == white


def test_right_answers_cost_nothing_and_wrong_ones_do() -> None:
    asked = torch.tensor([hints.about_caption(scene) for scene in (TWO, ONE, None)])
    right = answered(asked, hints.CAPTION).split(hints.CAPTION, dim=-1)
    assert hints.cost(right, asked) < 1e-3
    assert hints.cost(right, asked[[1, 0, 2]]) > 1
    assert hints.cost([answer[2:] for answer in right], asked[2:]) == 0, "nothing was asked"


def test_the_heads_hear_the_layers_and_teach_them() -> None:
    transformer = parts.make_transformer()
    heads = hints.Heads(transformer.config.dim)
    embeddings = [torch.randn(9, parts.TEXT_WIDTH) for _ in range(2)]
    with heads.listening(transformer):
        transformer([torch.randn(16, 1, 8, 12)] * 2, torch.rand(2), embeddings, return_dict=False)
    assert not any(layer._forward_hooks for layer in transformer.layers), "and then no more"
    heads.misplaced([TWO, None], rows=4, columns=6).backward()  # type: ignore[no-untyped-call]
    assert heads.thing.weight.grad is not None and heads.place.weight.grad is not None
    taught = [layer.feed_forward.w2.weight.grad is not None for layer in transformer.layers]
    assert taught == [index <= hints.THING_LAYER for index in range(len(taught))]


def test_the_text_encoder_is_taught_by_the_last_tokens_of_told_captions_alone() -> None:
    heads = hints.Heads(8)
    embeddings = [torch.randn(9, parts.TEXT_WIDTH, requires_grad=True) for _ in range(2)]
    heads.misread(embeddings, [TWO, None]).backward()  # type: ignore[no-untyped-call]
    told, left_out = (embedding.grad for embedding in embeddings)
    assert told is not None and left_out is not None
    assert told.abs().sum(dim=-1).gt(0).tolist() == [False] * 5 + [True] * 4
    assert not left_out.any()


def misplaced(heads: hints.Heads, placed: torch.Tensor, told: torch.Tensor, rows: int, columns: int) -> float:
    """Return the loss of patches whose states after the two layers are these, when nothing is told of them."""
    heads._heard |= {hints.PLACE_LAYER: placed, hints.THING_LAYER: told}
    return heads.misplaced([None], rows, columns).item()


def test_patches_are_asked_in_the_order_in_which_the_transformer_has_them() -> None:
    rows, columns = 4, 6
    transformer = parts.make_transformer()
    heads = hints.Heads(transformer.config.dim)
    positions = transformer.create_coordinate_grid((1, rows, columns), (0, 0, 0)).flatten(0, 2)
    states = torch.zeros(1, rows * columns, transformer.config.dim)
    states[0, :, 0] = (positions[:, 2] + 0.5) / columns * 4 - 2
    states[0, :, 1] = (positions[:, 1] + 0.5) / rows * 4 - 2
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
        heads.place.weight[:, :2] = torch.eye(2)
    nothing = states * 0
    right = misplaced(heads, states, nothing, rows, columns)
    assert right < 1e-6 < misplaced(heads, states.flip(1), nothing, rows, columns)


def test_the_sizes_are_those_of_the_model() -> None:
    rng = random.Random(1)
    sides = {side for _ in range(500) for side in pick_size(rng)}
    assert (min(sides), max(sides)) == (64, 256) and all(side % 16 == 0 for side in sides)
