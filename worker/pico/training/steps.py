"""What every training step shares: its random numbers, its pictures, its rate, its way down."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from worker.pico import scenes
from worker.pico.scenes import Scene

SEED = 3
SIDES = range(64, 257, 16)  # pixels


def pick_size(rng: random.Random) -> tuple[int, int]:
    """Return width and height in pixels: of any side, rather small than large."""
    sides = SIDES if rng.random() < 0.4 else [side for side in SIDES if side <= 160]
    return rng.choice(sides), rng.choice(sides)


def learnable(rng: random.Random) -> Scene:
    """Return a scene that is not kept for evaluation."""
    while (scene := scenes.invent(rng)).held_out:
        pass
    return scene


def pixels(drawn: Sequence[Scene], width: int, height: int, rng: random.Random) -> Tensor:
    """Return pictures of the scenes as (count, 3, height, width) in -1..1."""
    stack = np.stack([np.asarray(scenes.draw(scene, width, height, rng)) for scene in drawn])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, warm_up: int) -> float:
    """Return the share of the learning rate at a step: up in a line, down along a cosine to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down, however steep it is there."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
    optimizer.step()
