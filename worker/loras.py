"""The folder of LoRAs that tasks may name: what is in it, and what a task's choice stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UnknownLora
from common.loras import LORA_NAME, LoraChoice
from worker.pipelines.base import Lora

SUFFIX = ".safetensors"


def available(folder: Path | None) -> tuple[str, ...]:
    """Return the sorted names that `resolve` accepts; none without a folder, or while it cannot be read."""
    return tuple(sorted(_files(folder)))


def resolve(folder: Path | None, choices: Sequence[LoraChoice]) -> tuple[Lora, ...]:
    """Return the file and the scale of every choice; raises UnknownLora, which says what there is."""
    if not choices:
        return ()
    names = [choice.name for choice in choices]
    if len(set(names)) < len(names):
        raise UnknownLora.field("loras", "names must differ")
    files = _files(folder)
    for index, name in enumerate(names):
        if name not in files:
            there = f"there are: {', '.join(sorted(files))}" if files else "there are none (see ZFLEET_LORA_DIR)"
            raise UnknownLora.field(f"loras.{index}.name", f"this worker has no LoRA {name!r}; {there}")
    return tuple(Lora(files[choice.name], choice.scale) for choice in choices)


def _files(folder: Path | None) -> dict[str, Path]:
    """Return by name the regular files right inside the folder; links count where they lead to a place within it."""
    if folder is None:
        return {}
    try:
        root = folder.resolve(strict=True)
        paths = [path for path in root.iterdir() if path.suffix == SUFFIX and re.fullmatch(LORA_NAME, path.stem)]
        return {path.stem: path for path in paths if path.is_file() and path.resolve().is_relative_to(root)}
    except OSError:
        return {}
