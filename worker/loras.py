"""The folder of LoRAs that tasks may name: what is in it, and what a task's choice stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UnknownLora
from common.loras import LoraChoice, lora_files
from worker.pipelines.base import Lora


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
    try:
        return lora_files(folder) if folder is not None else {}
    except OSError:
        return {}
