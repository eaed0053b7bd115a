"""Judge a pico checkpoint by prompts it has never seen: `python -m worker.pico.evaluate [FOLDER]`.

Combinations and phrasings are kept out of training, half of the prompts are English and half Chinese. Ends with status
1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray
from PIL import Image

from worker import pico
from worker.pico.captions import Prompt, held_out
from worker.pico.judge import Judgement, judge
from worker.pico.scenes import LANGUAGES, Language, Scene

Size = tuple[int, int]  # width and height in pixels

SCENES = 250  # each in both languages
STEPS = 8
BATCH = 10
MAIN: Size = (128, 128)
OTHERS: tuple[Size, ...] = ((64, 96), (192, 128))
GOALS = {"object colour": 0.97, "background": 0.97, "left/right": 0.95, "shape": 0.90}
OTHER_GOALS = {"object colour": 0.90, "background": 0.90}
APART = 0.02  # Chinese may score so much below English,
ROUNDING = 1e-9  # give or take what is lost when two shares are subtracted
SECONDS = 0.4  # for one picture at 128 x 128
SHOWN = (
    "a red circle left of a blue square",
    "a big yellow star on a purple background",
    "an orange heart above a small black triangle, pink background",
    "white star on the right, green background",
    "左边红色方形,右边绿色圆形,灰色背景",
    "黑色背景，一个大的粉色爱心",
    "白色五角星在紫色三角形上面，蓝色背景",
    "橙色背景，右边有一个小的绿色方块",
)


@dataclass(slots=True)
class Scores:
    """How many were right of how many asked, by kind and language."""

    right: Counter[tuple[str, Language]] = field(default_factory=Counter)
    asked: Counter[tuple[str, Language]] = field(default_factory=Counter)

    def add(self, scene: Scene, language: Language, found: Judgement) -> None:
        """Count one judged picture."""
        place = (
            {"left": "left/right", "top": "above/below"}[scene.things[0].place] if len(scene.things) == 2 else "place"
        )
        verdicts: list[tuple[str, bool | None]] = [("background", found.background), (place, found.placed)]
        verdicts.append(("whole picture", found.matches))
        verdicts += [("object colour", colour) for colour in found.colours]
        verdicts += [("shape", shape) for shape in found.shapes]
        verdicts += [("size", size) for size in found.sizes]
        for kind, verdict in verdicts:
            if verdict is not None:
                self.asked[kind, language] += 1
                self.right[kind, language] += verdict

    def share(self, kind: str, *languages: Language) -> float:
        """Return the share that was right, of these languages or of all; NaN when none was asked."""
        asked = sum(self.asked[kind, language] for language in languages or LANGUAGES)
        return sum(self.right[kind, language] for language in languages or LANGUAGES) / asked if asked else float("nan")

    def misses(self, goals: dict[str, float], *, apart: bool) -> Iterator[str]:
        """Yield what falls short of the goals, in words."""
        for kind, goal in goals.items():
            if not self.share(kind) >= goal:  # nor when none was asked, which is NaN
                yield f"{kind} {self.share(kind):.3f} is below {goal}"
            if apart and not self.share(kind, "en") - self.share(kind, "zh") <= APART + ROUNDING:
                yield f"{kind}: Chinese {self.share(kind, 'zh'):.3f} against English {self.share(kind, 'en'):.3f}"

    def table(self, goals: dict[str, float]) -> str:
        """Return the scores as a Markdown table."""
        lines = ["| | English | Chinese | both | of | goal |", "|---|---|---|---|---|---|"]
        for kind in dict.fromkeys(kind for kind, _ in self.asked):
            shares = [self.share(kind, "en"), self.share(kind, "zh"), self.share(kind)]
            cells = [f"{share:.3f}" for share in shares]
            asked = sum(self.asked[kind, language] for language in LANGUAGES)
            lines.append(f"| {kind} | {' | '.join(cells)} | {asked} | {goals.get(kind, '')} |")
        return "\n".join(lines)


def paint(
    pipeline: Any, texts: Sequence[str], size: Size, first_seed: int = 0, *, guidance_scale: float = 0.0, **options: Any
) -> NDArray[np.uint8]:
    """Return pictures (count, height, width, 3) of the texts, drawn by plain diffusers with a seed each."""
    width, height = size
    generators = [torch.Generator().manual_seed(first_seed + index) for index in range(len(texts))]
    pictures: NDArray[np.float32] = pipeline(
        list(texts),
        width=width,
        height=height,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=generators,
        max_sequence_length=128,
        output_type="np",
        **options,
    ).images
    return (pictures * 255).round().astype(np.uint8)


def score(
    pipeline: Any, prompts: Sequence[Prompt], size: Size, on_progress: Callable[[int], None] = lambda done: None
) -> Scores:
    """Draw every prompt once and judge it."""
    scores = Scores()
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        for prompt, picture in zip(batch, paint(pipeline, [p.text for p in batch], size, first), strict=True):
            scores.add(prompt.scene, prompt.language, judge(picture, prompt.scene))
        on_progress(first + len(batch))
    return scores


def sheet(pipeline: Any) -> Image.Image:
    """Return what it paints for a few prompts, four to a row."""
    pictures = paint(pipeline, SHOWN, MAIN, first_seed=7)
    rows = [np.concatenate(list(pictures[first : first + 4]), axis=1) for first in range(0, len(SHOWN), 4)]
    return Image.fromarray(np.concatenate(rows))


def seconds_a_picture(pipeline: Any) -> float:
    """Return the median time of one picture at 128 x 128, alone and warm."""
    taken = []
    for seed in range(8):
        began = time.perf_counter()
        paint(pipeline, ["a red circle left of a green square on a grey background"], MAIN, seed)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint in the diffusers layout."""
    return (folder / "model_index.json").is_file()


def load(folder: Path) -> Any:
    """Return the stock pipeline on a checkpoint, in float32, silent."""
    pipeline = ZImagePipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: Sequence[str]) -> int:
    """Judge a checkpoint, or let it paint README's picture; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.pico.evaluate", description="Judge a pico checkpoint.")
    parser.add_argument("folder", type=Path, nargs="?", default=pico.FOLDER)
    parser.add_argument("--count", type=int, default=SCENES * len(LANGUAGES), help="prompts per picture size")
    parser.add_argument("--sheet", type=Path, help="write README's picture to this file, and judge nothing")
    options = parser.parse_args(arguments)
    if not is_checkpoint(options.folder):
        parser.error(f"{options.folder} is no checkpoint: it has no model_index.json")
    if options.count < 2 or options.count % 2:
        parser.error(f"--count: an even number from 2 on, half of it in each language, not {options.count}")
    pipeline = load(options.folder)
    if options.sheet:
        try:
            sheet(pipeline).save(options.sheet, quality=90)
        except (OSError, ValueError) as error:  # no such folder, or an ending that names no format
            parser.error(f"--sheet: {error}")
        return 0
    return report(pipeline, options.count)


def report(pipeline: Any, count: int) -> int:
    """Print the scores of so many prompts at each size; return 1 when a goal is missed."""
    prompts = held_out(count)
    missed: list[str] = []
    for size in (MAIN, *OTHERS):
        name, goals = f"{size[0]} x {size[1]}", GOALS if size == MAIN else OTHER_GOALS

        def tell(done: int, name: str = name) -> None:
            click.echo(f"\r{name}: {done}/{count}", nl=False, err=True)

        scores = score(pipeline, prompts, size, tell)
        click.echo(err=True)
        click.echo(f"\n{name}\n\n{scores.table(goals)}")
        missed += [f"{name}: {miss}" for miss in scores.misses(goals, apart=size == MAIN)]
    seconds = seconds_a_picture(pipeline)
    click.echo(f"\nOne picture at 128 x 128 with {torch.get_num_threads()} threads: {seconds:.3f} s (goal {SECONDS})")
    missed += [f"{seconds:.3f} s a picture"] if seconds > SECONDS else []
    click.echo("\n".join(["", *(f"Missed: {miss}" for miss in missed)]) if missed else "\nEvery goal is met.")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
