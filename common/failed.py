"""Tasks that failed, as whoever clears them up sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.records import attempt
from common.schemas import Attempt


class FailedTask(NamedTuple):
    """A task that RQ's registries have as failed; one that is not `known` has no record: nobody submitted it here."""

    task_id: str
    queue: str
    key_id: str  # that it came with
    retried: bool
    known: bool


class Purged(NamedTuple):
    """A task that is gone, and what it may have left in storage."""

    task_id: str
    images: Sequence[str]  # keys
    attempts: Mapping[int, Attempt]  # by fence


def purged(row: Sequence[str]) -> Purged:
    task_id, images, *attempts = row
    keys = [image["key"] for image in json.loads(images)]
    return Purged(task_id, keys, {int(n): attempt(text) for n, text in zip(attempts[::2], attempts[1::2], strict=True)})
