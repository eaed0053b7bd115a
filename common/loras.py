"""LoRAs that a task names, and the files that its names may stand for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

LORAS_MAX = 4  # of one task
SUFFIX = ".safetensors"
LORA_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class LoraChoice(BaseModel):
    """A LoRA to paint with: the name of its file in ZFLEET_LORA_DIR without the ending, and how strongly it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    scale: float = Field(default=1.0, ge=-4, le=4, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _name_could_be_a_files(cls, name: str) -> str:
        if not re.fullmatch(LORA_NAME, name):
            raise ValueError("must be 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit")
        return name


def lora_files(folder: Path) -> dict[str, Path]:
    """Return by name the regular files right inside the folder; links count where they lead to a place within it.

    Raises OSError.
    """
    root = Path(os.path.realpath(folder, strict=True))  # Path.resolve has RuntimeError for links that go round
    paths = [path for path in root.iterdir() if path.suffix == SUFFIX and re.fullmatch(LORA_NAME, path.stem)]
    return {path.stem: path for path in paths if path.is_file() and path.resolve().is_relative_to(root)}
