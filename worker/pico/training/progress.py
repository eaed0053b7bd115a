"""A long training that can be watched, and taken up again after an interruption."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch

KEEP_EVERY = 250  # steps


class Stale(click.ClickException):
    """What was kept belongs to another training."""


class Progress:
    """A line now and then: what is being done, how far it is, the time left, and means since the last line."""

    def __init__(self, what: str, total: int, every_s: float = 15.0) -> None:
        self._what, self._total, self._every_s = what, total, every_s
        self._told = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done at the first call, and when that was
        self._sums: dict[str, float] = {}
        self._count = 0

    def __call__(self, done: int, **figures: float) -> None:
        """Note that so many of the total are behind us."""
        self._first = self._first or (done, time.monotonic())
        self._count += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        now = time.monotonic()
        if now - self._told < self._every_s and done < self._total:
            return
        first, began = self._first
        pace = (done - first) / (now - began) if done > first else 0.0
        means = "".join(f"  {name} {total / self._count:.4f}" for name, total in self._sums.items())
        left = f"  {max(0, self._total - done) / pace / 60:.1f} min left" if pace else ""
        click.echo(f"{self._what} {min(done, self._total)}/{self._total}{means}{left}")
        self._told, self._sums, self._count = now, {}, 0


class Kept:
    """States of one training in a folder, each written whole or not at all."""

    def __init__(self, folder: Path, recipe: str) -> None:
        """`recipe` is whatever the states depend on: a state made by another is refused."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._recipe = hashlib.sha256(recipe.encode()).hexdigest()

    def save(self, name: str, **state: Any) -> None:
        """Keep a state under a name, in place of an older one."""
        draft = self._folder / f"{name}.draft"
        torch.save({"recipe": self._recipe, **state}, draft)
        draft.replace(self._folder / f"{name}.pt")

    def load(self, name: str) -> dict[str, Any] | None:
        """Return what was kept under the name, on the CPU; raises Stale when it is another training's."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if state.get("recipe") != self._recipe:
            raise Stale(f"{path} was made by other code or options; remove {self._folder}, or name another with --work")
        return state

    def steps(self, name: str, total: int, stateful: Mapping[str, Any]) -> Iterator[int]:
        """Yield the steps still to do, keeping the states of `stateful` now and then and at the end."""
        kept = self.load(name) or {"step": 0}
        for key in stateful.keys() & kept.keys():
            stateful[key].load_state_dict(kept[key])
        for step in range(kept["step"], total):
            yield step
            if (step + 1) % KEEP_EVERY == 0 or step + 1 == total:
                self.save(name, step=step + 1, **{key: part.state_dict() for key, part in stateful.items()})
