"""The Dockerfiles of deploy/compose, read: there is no engine here that could build them."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def extras(image: str) -> list[str]:
    """Those of zfleet that are installed in the image."""
    (install,) = [run.text for run in of(image, "RUN") if "pip install" in run.text]
    (names,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", install)
    return list(names.split(","))


def not_installed(image: str) -> set[str]:
    """Return the modules that are here, as in a venv for development, and not in the image.

    What is in the image follows from its extras, through the requirements of whatever they require.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in extras(image):
        wanted += project["optional-dependencies"][extra]
    requirements = [Requirement(text) for text in wanted]
    installed = {"zfleet": {""}}  # and with which extras
    while requirements:
        required = requirements.pop()
        name, chosen = canonicalize_name(required.name), {"", *required.extras}
        if name in installed and chosen <= installed[name]:
            continue
        chosen = installed[name] = installed.get(name, set()) | chosen
        for further in map(Requirement, metadata.requires(name) or ()):
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in chosen):
                requirements.append(further)
    owners = metadata.packages_distributions()
    return {
        module for module, names in owners.items() if not installed.keys() & {canonicalize_name(name) for name in names}
    } - {"pip", "setuptools", "_distutils_hack"}
