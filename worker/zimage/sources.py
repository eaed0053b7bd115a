"""Where a model's files are: in the package, in a folder here, or fetched from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from common.errors import ModelLoadFailed
from common.models import ModelSpec
from worker import pico
from worker.zimage.skeletons import KNOWN

FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # what is read; nothing here unpickles
PATTERNS = (
    "model_index.json",
    *(f"{part}/{files}" for part in KNOWN for files in FILES),
    "config.json",  # of a ControlNet, which has a repository to itself
    "diffusion_pytorch_model*.safetensors*",
)


class Source(NamedTuple):
    """A checkpoint's folder, and what to call it in a log."""

    folder: Path
    name: str


def find(spec: ModelSpec, source: str, revision: str | None) -> Source:
    """Return where a checkpoint is, fetched from the hub if need be; for a folder here the hub is never asked.

    Raises ModelLoadFailed for a folder that is not there; the hub's own errors pass.
    """
    if here := local_folder(spec, source):
        return Source(here, source)
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(PATTERNS)))
    return Source(folder, f"{source}@{folder.name[:12]}")  # a snapshot's folder is named after its commit


def local_folder(spec: ModelSpec, source: str) -> Path | None:
    """Return the folder of a source on this machine, or None for a hub id; raises ModelLoadFailed for no folder."""
    if source == "builtin":
        return pico.FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")):
        raise ModelLoadFailed(f"model {spec.name}: there is no folder {path}; correct its source")
    return None


def remedy(spec: ModelSpec, error: Exception) -> str:
    """Return what to tell the operator of a checkpoint that could not be loaded."""
    if spec.source == "builtin":
        advice = f"install zfleet again: {pico.FOLDER} is damaged"
    else:
        advice = (
            "the source must be a folder or hub id of a Z-Image checkpoint, diffusers format with safetensors; "
            "for the hub, check the network, HF_TOKEN and the revision, or download it and name the folder"
        )
    return f"model {spec.name} from {spec.source}: {type(error).__name__}: {error}; {advice}"
