"""What a GPU's figures were taken on, as a Markdown table, and where they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pynvml
import torch

from bench.report import machine

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
HEAD = (
    "case",
    "by",
    "pictures a step",
    "ms a step",
    "text, ms an image",
    "VAE, ms an image",
    "all of it, ms",
    "img/s",
    "× stock",
    "peak, GiB",
    "TFLOP/s",
    "of matmul",
)


def about(device: str) -> dict[str, Any]:
    """Return machine, versions and device."""
    backends: Any = torch.backends  # annotated in part
    found = machine(PACKAGES) | {"cuda": torch.version.cuda, "cudnn": backends.cudnn.version()}
    if device != "cuda":
        return found | {"device": {"name": "cpu"}, "driver": None}
    facts = torch.cuda.get_device_properties(0)
    return found | {
        "device": {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "multiprocessors": facts.multi_processor_count,
            "compute_capability": f"{facts.major}.{facts.minor}",
        },
        "driver": _driver(),
    }


def table(cases: Sequence[Mapping[str, Any]], matmul_tflop_per_s: float) -> str:
    """Return the measured cases as Markdown, medians of their repeats."""
    measured = [case for case in cases if "maker" in case]
    lines = [HEAD, ("---", "---", *["---:"] * (len(HEAD) - 2))]
    lines += [_cells(case, _stock(case, measured), matmul_tflop_per_s) for case in measured]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write the figures as JSON, or not at all: a half-written file is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(_rounded(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    beside.replace(path)


def _cells(case: Mapping[str, Any], stock: float | None, matmul: float) -> tuple[str, ...]:
    if "error" in case:
        return (case["case"], case["maker"], case["error"], *[""] * (len(HEAD) - 3))
    rate, arithmetic, peak = case["images_per_s"]["median"], case["dit_tflop_per_s"]["median"], case["peak_gib"]
    times = [case[name]["median"] for name in ("step_ms", "text_ms_per_image", "vae_ms_per_image", "whole_ms")]
    return (
        case["case"],
        case["maker"],
        f"{case['items_per_forward']['mean']:.1f}",
        *(f"{each:.1f}" for each in times),
        f"{rate:.3f}",
        f"{rate / stock:.2f}" if stock and case["maker"] != "stock" else "",
        "" if peak is None else f"{peak:.1f}",
        f"{arithmetic:.3g}",
        f"{100 * arithmetic / matmul:.0f}%",
    )


def _stock(case: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the stock pipeline's images a second in the same case."""
    for each in measured:
        if each["case"] == case["case"] and each["maker"] == "stock" and "error" not in each:
            return float(each["images_per_s"]["median"])
    return None


def _driver() -> str:
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return version.decode() if isinstance(version, bytes) else str(version)


def _rounded(value: Any) -> Any:
    """Round to six significant digits, as no clock here knows more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
