"""The results' disk, and the models' files: there, whole, readable, and by their checksums the ones that were meant.

What the hub's cache holds is named after its checksum: SHA-256 for large files, git's own for small ones. A folder may
have a SHA256SUMS, as sha256sum writes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.models import ModelSpec
from zfleet.doctor.report import Finding, Patient

HASH_S = 15.0  # for checksums, where not all are asked for
CHUNK = 1 << 20
HEADER_MAX = 100_000_000  # bytes; as safetensors itself allows
SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class Damaged(Exception):
    """Raised for a file that is not what it should be."""


def disk(patient: Patient) -> Iterator[Finding]:
    """Look at the disk of the results, which may be one of its own below ZFLEET_DATA_DIR."""
    settings = patient.settings
    folder = settings.results_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    full = usage.used / ((usage.used + usage.free) or 1) * 100
    says = f"{settings.results_dir}: {usage.free / 1e9:.1f} GB free, {full:.0f}% full"
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("disk", "problem", f"{folder} may not be written", "give it to this user, or set ZFLEET_DATA_DIR")
    elif full >= settings.disk_pause_percent:
        pause = f"new tasks pause from {settings.disk_pause_percent:g}%"
        yield Finding("disk", "problem", says, f"{pause}: make room, or lower ZFLEET_RETENTION_DAYS")
    elif full >= settings.disk_resume_percent:
        yield Finding("disk", "warning", says, "make room before new tasks pause")
    else:
        yield Finding("disk", "ok", says)


def models(patient: Patient) -> Iterator[Finding]:
    """Look at the files of the models that are served here."""
    until = float("inf") if patient.checksums else time.monotonic() + HASH_S
    for spec in patient.settings.catalogue().values():
        for source, revision in ((spec.source, spec.revision), (spec.controlnet, spec.controlnet_revision)):
            if source is not None and spec.pipeline != "simulated":
                yield _model(spec, source, revision, until)


def _model(spec: ModelSpec, source: str, revision: str | None, until: float) -> Finding:
    check = f"model {spec.name}"
    folder = Path(source).expanduser()
    if source == "builtin":
        if importlib.util.find_spec("worker") is None:
            return Finding(check, "skipped", "it ships with workers, and this is an image of the gateway alone")
        from worker import pico

        folder = pico.FOLDER
    elif not folder.is_dir():
        if source.startswith((".", "/", "~")):
            return Finding(check, "problem", f"there is no folder {folder}", "correct its source in the models file")
        cached = _cached(source, revision)
        if isinstance(cached, Finding):
            return Finding(check, cached.state, cached.says, cached.remedy)
        folder = cached
    try:
        known, checked = whole(folder, until)
    except Damaged as error:
        return Finding(check, "problem", str(error), "fetch it anew: remove that file, and start a worker")
    except OSError as error:
        return Finding(check, "problem", f"{error.filename}: {error.strerror}", "let the worker's user read it")
    sums = "no checksums to compare with" if not known else f"{checked} of {known} checksums compared"
    more = "; --checksums compares all" if checked < known else ""
    return Finding(check, "ok", f"{folder}: whole, {sums}{more}")


def _cached(source: str, revision: str | None) -> Path | Finding:
    """Return the hub's snapshot of a commit, or what to say where it is not here."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding("", "skipped", "huggingface_hub is not installed; a gateway's host needs no model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        says = f"{source} at {(revision or 'no revision')[:12]} is not on this machine"
        return Finding("", "warning", says, "a worker fetches it at its start, which takes a while and a network")


def whole(folder: Path, until: float) -> tuple[int, int]:
    """Return how many checksums are known, and how many were compared before `until`; raises Damaged, OSError."""
    if not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise Damaged(f"{folder} has no model_index.json: it is no checkpoint of diffusers'")
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    sums = _sums(folder)
    for path in files:
        if path.name.endswith(".index.json"):
            _require_shards(path)
        if path.suffix == ".safetensors":
            check_safetensors(path)
    if missing := [name for name in sums if not (folder / name).exists()]:
        raise Damaged(f"{folder / missing[0]} is missing, though {SUMS} names it")
    known = {path: total for path in files if (total := sums.get(str(path.relative_to(folder)), _blob(path)))}
    checked = 0
    for path, total in known.items():
        if time.monotonic() >= until:
            break
        done = _digest(path, total, until)
        if done is not None and done != total:
            raise Damaged(f"{path} has another checksum than it should")
        checked += done is not None
    return len(known), checked


def _sums(folder: Path) -> Mapping[str, str]:
    path = folder / SUMS
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return {match[2]: match[1] for line in lines if (match := _SUM.fullmatch(line))}


def _blob(path: Path) -> str | None:
    """Return the checksum that the hub's cache has named a file after."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _digest(path: Path, like: str, until: float) -> str | None:
    """Return a file's checksum of the kind that `like` is; None where there is no time for it."""
    sha = hashlib.sha256()
    if len(like) == 40:
        sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            if time.monotonic() >= until:
                return None
    return sha.hexdigest()


def _require_shards(index: Path) -> None:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text("utf-8")).get("weight_map", {}).values()})
    except (ValueError, AttributeError, RecursionError):
        raise Damaged(f"{index} is no list of a checkpoint's files: it is cut off, or something else") from None
    for name in names:
        if not (index.parent / name).exists():
            raise Damaged(f"{index.parent / name} is missing, though {index.name} names it")


def check_safetensors(path: Path) -> None:
    """Raise Damaged unless the head is sound and the file as long as that says.

    Eight bytes of length, little-endian, then that much JSON with each tensor's place in what follows.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            head: Any = json.loads(file.read(length)) if length <= min(HEADER_MAX, size - 8) else None
            ends = [int(tensor["data_offsets"][1]) for name, tensor in head.items() if name != "__metadata__"]
        except (ValueError, OverflowError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            raise Damaged(f"{path} has no head of a safetensors file: it is cut off, or something else") from None
    if size != 8 + length + max(ends, default=0):
        raise Damaged(f"{path} has {size} bytes, not the {8 + length + max(ends, default=0)} that its head tells of")
