"""What a scene says of its caption and of each patch, asked of the networks' inner layers while they are trained.

A small network that only sees its pictures' errors finds out late what the words mean and where in the picture it is.
Asked halfway for what it has to know by then, it finds out soon. The heads that answer are thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.pico.parts import TEXT_WIDTH
from worker.pico.scenes import PALETTE, SHAPES, UNSAID_BACKGROUND, Scene, Thing

COLOURS = [*PALETTE, None]  # None: unsaid, any
SIZES = ("big", None, "small")
LAYOUTS = ("centre", "left", "right", "top", "bottom", "beside", "stacked")
THING = (len(COLOURS), len(SHAPES), len(SIZES))
NOTHING = -100  # no question is asked here; the value that cross-entropy leaves out

CAPTION = (len(PALETTE), len(LAYOUTS), *THING, *THING)  # answers to choose from, for each question about a caption
PATCH = (len(PALETTE), 2, *THING)  # about a patch: background, whether a thing may stand here, which one
CLOSING = 4  # tokens at the end of every prompt: the same ones always, and they have read all of it
PLACE_LAYER = 1  # after this layer a patch is asked where in the picture it is,
THING_LAYER = 3  # and after this one what stands there


class Heads(nn.Module):
    """Linear answers from states of the text encoder and of two layers of the transformer."""

    def __init__(self, width: int) -> None:
        """`width` is the transformer's."""
        super().__init__()
        self.caption = nn.Linear(CLOSING * TEXT_WIDTH, sum(CAPTION))
        self.place = nn.Linear(width, 2)
        self.thing = nn.Linear(width, sum(PATCH) + 2)
        self._heard: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def listening(self, transformer: Any) -> Iterator[None]:
        """Hear what the two layers of the transformer put out."""
        hooks = [
            transformer.layers[layer].register_forward_hook(self._hear(layer)) for layer in (PLACE_LAYER, THING_LAYER)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hear(self, layer: int) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._heard[layer] = output

        return note

    def misread(self, embeddings: Sequence[Tensor], scenes: Sequence[Scene | None]) -> Tensor:
        """Return how far the scenes are from being told by their captions' embeddings (tokens, text width): a loss.

        A scene is None where the caption was left out.
        """
        ends = torch.stack([embedding[-CLOSING:].flatten() for embedding in embeddings])
        answers = self.caption(ends).split(CAPTION, dim=-1)
        asked = torch.tensor([about_caption(scene) for scene in scenes], device=ends.device)
        return cost(answers, asked)

    def misplaced(self, scenes: Sequence[Scene | None], rows: int, columns: int) -> Tensor:
        """Return how far the scenes' patches are from being known within the last forward: a loss.

        A picture has `rows` times `columns` patches of 16 x 16 pixels, which come before the caption's tokens.
        """
        placed, told = (self._heard.pop(layer)[:, : rows * columns] for layer in (PLACE_LAYER, THING_LAYER))
        across = (torch.arange(columns) + 0.5) / columns
        down = (torch.arange(rows) + 0.5) / rows
        here = torch.stack([across.repeat(rows), down.repeat_interleave(columns)], dim=-1).to(placed.device)
        answers = self.thing(told)
        right = [about_patches(scene, here) for scene in scenes]
        asked, offsets = (torch.stack(each) for each in zip(*right, strict=True))
        inside = asked[..., 1:2] == 1
        place = functional.mse_loss(self.place(placed).float(), (4 * here - 2).expand(len(scenes), -1, -1))
        offset: Tensor = ((answers[..., -2:].float() - offsets) ** 2 * inside).mean()
        return place + cost(answers[..., :-2].split(PATCH, dim=-1), asked) + offset


def about_caption(scene: Scene | None) -> list[int]:
    """Return the right answers about a scene's caption, in the order of CAPTION."""
    if scene is None:
        return [NOTHING] * len(CAPTION)
    first, *rest = scene.things
    layout = {"left": "beside", "top": "stacked"}[first.place] if rest else first.place
    second = _of_thing(rest[0]) if rest else [NOTHING] * len(THING)
    return [_background(scene), LAYOUTS.index(layout), *_of_thing(first), *second]


def about_patches(scene: Scene | None, here: Tensor) -> tuple[Tensor, Tensor]:
    """Return the right answers about patches at `here` (patches, 2), in the order of PATCH, and where each is
    from the middle of its thing's part of the picture (patches, 2), 2 at its edge.
    """
    answers = torch.full((len(here), len(PATCH)), NOTHING)
    offsets = torch.zeros(len(here), 2)
    if scene is None:
        return answers.to(here.device), offsets.to(here.device)
    answers[:, :2] = torch.tensor([_background(scene), 0])
    for thing in scene.things:
        left, top, right, bottom = thing.box(1, 1)
        x, y = here[:, 0].cpu(), here[:, 1].cpu()
        inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        answers[inside] = torch.tensor([_background(scene), 1, *_of_thing(thing)])
        middle, half = torch.tensor([left + right, top + bottom]) / 2, torch.tensor([right - left, bottom - top]) / 2
        offsets[inside] = (here.cpu()[inside] - middle) / half * 2
    return answers.to(here.device), offsets.to(here.device)


def cost(answers: Sequence[Tensor], asked: Tensor) -> Tensor:
    """Return the cross-entropy, a mean of each question's mean, of logits against right answers (…, questions)."""
    losses = [
        functional.cross_entropy(answer.flatten(0, -2).float(), right.flatten(), ignore_index=NOTHING, reduction="sum")
        / (right != NOTHING).sum().clamp(min=1)
        for answer, right in zip(answers, asked.unbind(dim=-1), strict=True)
    ]
    return torch.stack(losses).mean()


def _of_thing(thing: Thing) -> list[int]:
    return [COLOURS.index(thing.colour), SHAPES.index(thing.shape), SIZES.index(thing.size)]


def _background(scene: Scene) -> int:
    return COLOURS.index(scene.background or UNSAID_BACKGROUND)
