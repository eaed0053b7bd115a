"""The folders that settings name beside the results': where logs are written, and where LoRAs are read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.logfiles import ROTATE_BYTES, ROTATE_KEEP
from common.loras import SUFFIX, lora_files
from zfleet.doctor.files import Damaged, check_safetensors
from zfleet.doctor.report import Finding, Patient

LOG_MAX = ROTATE_BYTES * (ROTATE_KEEP + 1)  # bytes that one process' logs may take
FULL = 1 << 20  # bytes free: lines are being lost, or soon
WRITTEN = re.compile(r"([a-z]+-[0-9]+|gpu(-[0-9]+)?)\.(log|csv|lock)")


def logs(patient: Patient) -> Iterator[Finding]:
    """Look at ZFLEET_LOG_DIR: may it be written, and is there room."""
    folder = patient.settings.log_dir
    if folder is None:
        yield Finding("logs", "skipped", "ZFLEET_LOG_DIR is not set: they go to stderr")
        return
    there = folder
    while not os.path.lexists(there) and there != there.parent:  # it is made by whoever first logs
        there = there.parent
    mine = "give it to this user, or set ZFLEET_LOG_DIR"
    if not there.is_dir():
        yield Finding("logs", "problem", f"{there} is no folder", "set ZFLEET_LOG_DIR to one")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Finding("logs", "problem", f"{there} may not be written", mine)
    elif foreign := next((path for path in _written(folder) if not os.access(path, os.W_OK)), None):
        yield Finding("logs", "problem", f"{foreign} may not be written: another user began it", mine)
    else:
        yield _room(folder, shutil.disk_usage(there).free)


def loras(patient: Patient) -> Iterator[Finding]:
    """Look at ZFLEET_LORA_DIR: a line for all that can be used, and one for each file that cannot."""
    folder = patient.settings.lora_dir
    if folder is None:
        yield Finding("loras", "skipped", "ZFLEET_LORA_DIR is not set: tasks can name none")
        return
    try:
        named = lora_files(folder)
        others = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.stem not in named)
    except OSError as error:
        remedy = "let the worker's user read it, or correct ZFLEET_LORA_DIR"
        yield Finding("loras", "problem", f"{folder}: {error.strerror}", remedy)
        return
    broken = [finding for path in named.values() if (finding := _lora(path))]
    whole = len(named) - len(broken)
    if named or others:
        yield Finding("loras", "ok" if whole else "warning", f"{folder}: {whole} can be named by tasks")
    else:
        yield Finding("loras", "warning", f"{folder} has none", f"put <name>{SUFFIX} there, or unset ZFLEET_LORA_DIR")
    yield from broken
    for path in others:
        remedy = (
            "it has to be a file within the folder, named by up to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        )
        yield Finding("loras", "warning", f"{path} cannot be named by tasks", remedy)


def _written(folder: Path) -> list[Path]:
    """Return the files there that this fleet's processes write."""
    return sorted(path for path in folder.iterdir() if WRITTEN.fullmatch(path.name)) if folder.is_dir() else []


def _room(folder: Path, free: int) -> Finding:
    """Judge the bytes that are free for logs."""
    says = f"{folder}: {free / 1e9:.1f} GB free; each process keeps up to {LOG_MAX / 1e9:.1f} GB"
    if free < FULL:
        return Finding("logs", "problem", f"{says}, and lines are lost", "make room there, or set ZFLEET_LOG_DIR")
    if free < LOG_MAX:
        return Finding("logs", "warning", says, "make room there: on a full disk lines are lost, though no work is")
    return Finding("logs", "ok", says)


def _lora(path: Path) -> Finding | None:
    """Return what is wrong with a file, if anything is."""
    try:
        check_safetensors(path)
    except Damaged as error:
        return Finding("loras", "problem", str(error), "fetch it anew, or remove it")
    except OSError as error:
        return Finding("loras", "problem", f"{path}: {error.strerror}", "let the worker's user read it")
    return None
