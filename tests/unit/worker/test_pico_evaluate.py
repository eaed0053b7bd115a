"""How pico is scored: what counts as a miss, and what is told."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker.pico import captions, evaluate, scenes

SHAPE = {"shape": 0.9}


def scored(en: int, zh: int, of: int = 100) -> evaluate.Scores:
    """Return scores with so many right shapes in each language."""
    scores = evaluate.Scores()
    scores.right["shape", "en"], scores.right["shape", "zh"] = en, zh
    scores.asked["shape", "en"] = scores.asked["shape", "zh"] = of
    return scores


@pytest.mark.parametrize(
    ("en", "zh", "missed"),
    [
        (91, 90, []),
        (92, 90, []),
        (90, 99, []),
        (88, 91, ["shape 0.895 is below 0.9"]),
        (95, 90, ["shape: Chinese 0.900 against English 0.950"]),
    ],
)
def test_a_goal_is_missed_below_it_and_where_chinese_falls_behind(en: int, zh: int, missed: list[str]) -> None:
    assert list(scored(en, zh).misses(SHAPE, apart=True)) == missed


def test_what_nobody_asked_is_missed_too() -> None:
    assert len(list(evaluate.Scores().misses(SHAPE, apart=False))) == 1


def test_the_table_has_a_row_for_each_kind() -> None:
    assert scored(91, 90).table(SHAPE).splitlines()[-1] == "| shape | 0.910 | 0.900 | 0.905 | 200 | 0.9 |"


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let a perfect painter paint, or one that ignores Chinese: no model."""
    known = {prompt.text: prompt.scene for prompt in captions.held_out(40)}
    state: dict[str, Any] = {"deaf": False}

    def paint(pipeline: object, texts: list[str], size: evaluate.Size, first_seed: int = 0, **_: object) -> Any:
        drawn = []
        for index, text in enumerate(texts):
            scene = known.get(text, scenes.Scene((scenes.Thing("circle", "red"),), "grey"))
            if state["deaf"] and not text.isascii():
                scene = scenes.Scene((scenes.Thing("heart", "black"),), "pink")
            drawn.append(np.asarray(scenes.draw(scene, *size, random.Random(first_seed + index))))
        return np.stack(drawn)

    monkeypatch.setattr(evaluate, "paint", paint)
    return state


def test_a_perfect_painter_meets_every_goal(painter: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.report(None, 40) == 0
    said = capsys.readouterr()
    assert "Every goal is met." in said.out
    assert "128 x 128: 40/40" in said.err
    for kind in (*evaluate.GOALS, "above/below", "place", "size", "whole picture"):
        assert f"| {kind} | 1.000 | 1.000 | 1.000 |" in said.out


def test_a_painter_that_reads_no_chinese_is_told_so(
    painter: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    painter["deaf"] = True
    assert evaluate.report(None, 40) == 1
    said = capsys.readouterr().out
    assert re.search(r"Missed: 128 x 128: background 0\.\d+ is below", said)
    assert "Missed: 128 x 128: shape: Chinese" in said
    assert "against English 1.000" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is no checkpoint"),
        (["--count", "0"], "--count: an even number from 2 on"),
        (["--count", "3"], "--count: an even number from 2 on"),
        (["--sheet", "nowhere/sheet.webp"], "--sheet: "),
        (["--sheet", "sheet.xyz"], "--sheet: "),
    ],
)
@pytest.mark.usefixtures("painter")
def test_wrong_arguments_are_told(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda folder: None)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(arguments)
    assert told in capsys.readouterr().err


def test_the_sheet_shows_every_prompt(painter: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "load", lambda folder: None)
    assert evaluate.main(["--sheet", str(tmp_path / "sheet.webp")]) == 0
    assert Image.open(tmp_path / "sheet.webp").size == (4 * 128, 2 * 128)
