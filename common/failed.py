"""Tasks that failed, as whoever clears them up sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.records import attempt
from common.schemas import Attempt


class FailedTask(NamedTuple):
    """A task that RQ's registries have as failed; one that is not `known` has no record: nobody submitted it here."""

    task_id: str
    queue: str
    key_id: str  # that it came with
    created_ms: int  # since 1970, by Redis' clock
    retried: bool
    known: bool


class Place(NamedTuple):
    """How far somebody has come who works through what failed, and what is too new to count."""

    until_ms: int  # tasks made later are left out, or what fails again at once would never come to an end
    queue: str
    task_id: str

    def __str__(self) -> str:
        return f"{self.until_ms}/{self.queue}/{self.task_id}"


def place(text: str) -> Place:
    """Read a place as it is written; raises ValueError."""
    if not (match := re.fullmatch(r"([0-9]{1,15})/([^/\s]{1,200})/([^/\s]{1,64})", text)):
        raise ValueError("must be the next_cursor of an answer before")
    return Place(int(match[1]), match[2], match[3])


class Purged(NamedTuple):
    """A task that is gone, and what it may have left in storage."""

    task_id: str
    images: Sequence[str]  # keys
    attempts: Mapping[int, Attempt]  # by fence


def purged(row: Sequence[str]) -> Purged:
    task_id, images, *attempts = row
    keys = [image["key"] for image in json.loads(images)]
    return Purged(task_id, keys, {int(n): attempt(text) for n, text in zip(attempts[::2], attempts[1::2], strict=True)})
