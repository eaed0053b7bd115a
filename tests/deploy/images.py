"""The Dockerfiles of deploy/compose, read: there is no engine here that could build them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
IMAGES = ("gateway", "worker")


class Instruction(NamedTuple):
    """As `COPY common common`; `last` tells whether it is of the last stage."""

    name: str
    text: str
    last: bool


def instructions(image: str) -> list[Instruction]:
    """Return the image's instructions, each on one line, comments left out."""
    text = (FOLDER / f"Dockerfile.{image}").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    last = max(number for number, line in enumerate(whole) if line.startswith("FROM "))
    return [Instruction(*line.split(" ", 1), last=number >= last) for number, line in enumerate(whole)]


def of(image: str, name: str) -> list[Instruction]:
    return [instruction for instruction in instructions(image) if instruction.name == name]


def copied(image: str) -> list[str]:
    """What goes into the image from here."""
    sources = [shlex.split(copy.text)[:-1] for copy in of(image, "COPY")]
    return [source for line in sources if not line[0].startswith("--from=") for source in line]


def environment(image: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of(image, "ENV") for pair in shlex.split(line.text))


def services(folder: Path = FOLDER) -> Any:
    """The services of compose.yaml as they are written, anchors resolved."""
    return yaml.safe_load((folder / "compose.yaml").read_text("utf-8"))["services"]
