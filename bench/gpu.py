"""Z-Image in its full size on this machine's GPU, ours and the stock pipeline side by side; nothing is downloaded.

`python -m bench.gpu` takes an estimated quarter of an hour on an H100, `--quick` five minutes. It prints a table and
writes bench/results/<date>-gpu.json. The weights are random: the work is that of the real model, the pictures are
noise. `--tiny` runs the same code in miniature on a CPU, to test it. How each figure is measured: bench/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, python looks only beside it

import torch

from bench import gpu_cases, gpu_models, gpu_report
from bench.flops import matmul
from bench.gpu_cases import GIB, Plan, Say
from bench.gpu_makers import Maker, StepBatches, StockCalls
from bench.gpu_meter import Meter
from bench.gpu_models import Models, Shape
from worker.zimage.parts import Parts
from zfleet.interrupts import Interrupts

RESULTS = Path(__file__).parent / "results"
SEED = 20261125
FULL = Plan()
QUICK = Plan(repeats=2, mixed=10, mixed_repeats=1, stream=8)
TINY = Plan(repeats=2, mixed=7, mixed_repeats=1, stream=4, shrink=8)
ROOM_BYTES = 2 * GIB  # beside the weights: less, and not one picture can be made

REFUSED = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 2 where there is no GPU for it, 130 when interrupted: what it has is written."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    device, shape, dtype = (
        ("cpu", gpu_models.TINY, torch.float32) if options.tiny else ("cuda", gpu_models.FULL, torch.bfloat16)
    )
    if why := None if options.tiny else refusal(shape):
        sys.stderr.write(f"gpu: {why}\n")
        return REFUSED
    plan = TINY if options.tiny else QUICK if options.quick else FULL
    found: dict[str, Any] = gpu_report.about(device) | {
        "command": shlex.join(["python", "-m", "bench.gpu", *given]),
        "complete": False,
        "tiny": options.tiny,
        "plan": asdict(plan),
        "seed": SEED,
    }
    began = time.monotonic()
    code = 0
    try:
        with Interrupts():
            for part in measure(shape, plan, device=device, dtype=dtype, say=_sayer(began)):
                found |= part
        found["complete"] = True
    except KeyboardInterrupt:
        sys.stderr.write("gpu: interrupted; what was measured until now is kept, marked as incomplete\n")
        code = INTERRUPTED
    finally:
        found["took_s"] = time.monotonic() - began
        _tell(found, _file(options))
    return code


def measure(shape: Shape, plan: Plan, *, device: str, dtype: torch.dtype, say: Say) -> Iterator[dict[str, Any]]:
    """Yield the parts of the result, each as soon as it is whole; `cases` grows."""
    say("a matrix product")
    best = matmul(device, dtype)
    yield {"dtype": str(dtype).removeprefix("torch."), "matmul": best}
    models = gpu_models.make(shape, device=device, dtype=dtype, seed=SEED, say=say)
    yield {"weights": {"parameters": models.parameters(), "gib": models.weight_bytes() / GIB}}
    parts = models.parts()
    ours = StepBatches(parts, device=device)
    makers: tuple[Maker, ...] = (ours, StockCalls(models))
    cases: list[dict[str, Any]] = []
    with metered(models, parts, device) as meter:
        for case in gpu_cases.cases(plan):
            for figures in gpu_cases.measure(case, makers, meter, device=device, say=say):
                if "dit_tflop_per_s" in figures:
                    figures["share_of_matmul"] = figures["dit_tflop_per_s"]["median"] / best["tflop_per_s"]
                cases.append(figures)
            yield {"cases": cases}
        yield {"emptying": gpu_cases.emptying(ours, meter, plan, device=device, say=say)}


def metered(models: Models, parts: Parts, device: str) -> Meter:
    networks = {
        "transformer": [models.transformer],
        "text_encoder": [models.text_encoder, parts.text_encoder],
        "vae": [models.vae.decoder],  # once for each tile
    }
    return Meter(networks, device)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu",
        usage=argparse.SUPPRESS,  # a mistake is told in one line
        description="Measure Z-Image's full-size networks with random weights on a GPU, and stock diffusers beside.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: an estimated five minutes on an H100")
    parser.add_argument(
        "--tiny", action="store_true", help="the same code in miniature on the CPU; writes only to --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder for the JSON file (bench/results)")
    return parser.parse_args(given)


def refusal(shape: Shape) -> str | None:
    """Return why the full size cannot be measured here, and what to do; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; run it on a machine with one, or add --tiny for a miniature on the CPU"
    needed = needed_bytes(shape)
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        return (
            f"{free / GIB:.1f} GiB of the GPU's memory are free and {needed / GIB:.1f} are needed; end what holds them"
        )
    return None


def needed_bytes(shape: Shape) -> int:
    """Return what bfloat16 weights and one picture take of a GPU's memory."""
    networks = gpu_models.skeletons(shape).values()
    return sum(map(gpu_models.count, networks)) * torch.bfloat16.itemsize + ROOM_BYTES


def _file(options: argparse.Namespace) -> Path | None:
    """Return where to write; None for a miniature, whose figures mean nothing, unless a folder is named."""
    if options.tiny and not options.out:
        return None
    kind = "-tiny" if options.tiny else "-quick" if options.quick else ""
    return Path(options.out or RESULTS, f"{datetime.now(UTC):%Y-%m-%d}-gpu{kind}.json")


def _tell(found: dict[str, Any], path: Path | None) -> None:
    if "cases" in found:
        print(gpu_report.table(found["cases"], found["matmul"]["tflop_per_s"]))
    if path and "matmul" in found:
        if not found["complete"]:
            path = path.with_stem(path.stem + "-incomplete")  # never over a whole one
        gpu_report.save(path, found)
        sys.stderr.write(f"gpu: written to {path}\n")


def _sayer(began: float) -> Say:
    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:6.1f} s] {text}\n")
        sys.stderr.flush()

    return say


if __name__ == "__main__":
    sys.exit(main())
