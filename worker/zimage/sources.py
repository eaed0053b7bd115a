"""Where a model's files are: in the package, in a folder here, or fetched from the hub; and what to do when they are
not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from transformers.utils import logging as transformers_logging

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
COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(NamedTuple):
    """A checkpoint's folder, and what to call it in a log."""

    folder: Path
    name: str


def find(spec: ModelSpec, source: str, revision: str | None) -> Source:
    """Return where a Z-Image checkpoint is, fetched from the hub if need be.

    Raises ModelLoadFailed for a folder that is not there and a hub id without a commit; the hub's own errors pass.
    """
    if (here := local_folder(spec, source)) is not None:
        return Source(here, source)
    pinned = commit(spec, source, revision)
    folder = Path(snapshot_download(source, revision=pinned, allow_patterns=list(PATTERNS)))
    return Source(folder, f"{source}@{folder.name[:12]}")  # a snapshot's folder is named after its commit


def local_folder(spec: ModelSpec, source: str) -> Path | None:
    """Return the folder of a model that is on this machine, for which the hub is never asked; None for a hub id.

    Raises ModelLoadFailed for a folder that is not there.
    """
    if source == "builtin":
        return pico.FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith((".", "/", "~")):
        raise ModelLoadFailed(f"model {spec.name}: there is no folder {path}; correct its source")
    return None


def commit(spec: ModelSpec, source: str, revision: str | None) -> str:
    """Return the commit at which a hub id is fetched; raises ModelLoadFailed for a branch, a tag or nothing.

    Those are moved by whoever owns the repository: what is loaded tomorrow would be something else.
    """
    if revision is None or not COMMIT.fullmatch(revision):
        raise ModelLoadFailed(
            f"model {spec.name}: {source} comes from the hub, so its revision must be a commit of 40 hex digits, not "
            f"{revision!r}; set it in the models file, or download the model and name the folder"
        )
    return revision


@contextmanager
def loading(spec: ModelSpec, kind: str) -> Iterator[None]:
    """Keep the libraries quiet while they load, and raise ModelLoadFailed with the remedy for whatever they raise.

    `kind` says what the checkpoint should be.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a worker's output is one JSON object a line
        library.disable_default_handler()
        library.enable_propagation()
    try:
        yield
    except ModelLoadFailed:
        raise
    except torch.OutOfMemoryError as error:
        advice = "free the GPU, choose a smaller model, or serve fewer models on this worker"
        raise ModelLoadFailed(f"model {spec.name}: not enough GPU memory; {advice} ({error})") from error
    except Exception as error:  # the libraries raise nearly anything for a broken checkpoint
        raise ModelLoadFailed(_remedy(spec, kind, error)) from error


def _remedy(spec: ModelSpec, kind: str, error: Exception) -> str:
    if spec.source == "builtin":
        advice = f"install zfleet again: {pico.FOLDER} is damaged"
    else:
        advice = (
            f"the source must be a folder or hub id of {kind}, diffusers format with safetensors; "
            "for the hub, check the network, HF_TOKEN and the revision, or download it and name the folder"
        )
    return f"model {spec.name} from {spec.source}: {type(error).__name__}: {error}; {advice}"
