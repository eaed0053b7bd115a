"""What LoRAs cost a step: plain, with one, switching between two at every step, and the first use of a file.

`python bench/lora.py` takes a minute on a CPU with pico; `--device cuda --source <folder or hub id>` measures another
checkpoint on a GPU. Prints a Markdown table and writes bench/results/lora-<time>.json. On a CPU times are the
processor's, as the clock's would tell of the machine's other work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, python looks only beside it

import torch
from safetensors.torch import save_file

from bench.report import Row, machine, save, table
from common.models import load_catalogue
from worker.pipelines.base import MIB, ImageRequest, Lora, Run
from worker.pipelines.zimage import Pipeline
from worker.zimage.adapters import MAX_COUNT, Adapters
from worker.zimage.lorafile import linear_shapes

PACKAGES = ("torch", "diffusers", "peft", "safetensors")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")  # attention and feed-forward, in every block


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int = 15
    steps: int = 16  # of each kind in a round
    rank: int = 16


QUICK = Plan(rounds=1, steps=2, rank=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="lora", usage=argparse.SUPPRESS, description="Measure what LoRAs cost.")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--source", default="builtin", help="a Z-Image checkpoint; pico when unset")
    parser.add_argument("--side", type=int, default=128, help="pixels of the square pictures")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--out", type=Path, help="the JSON file to write (bench/results/lora-<time>.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    spec = load_catalogue()["pico"].model_copy(update={"source": options.source, "dtype": "bfloat16"})
    pipeline = Pipeline(spec, device=options.device)
    pipeline.load()
    about = _about(options.device)
    with tempfile.TemporaryDirectory(prefix="zfleet-bench-") as folder:
        rows = Bench(pipeline, options.side, QUICK if options.quick else Plan()).measure(Path(folder))
    print(table(rows))
    results = Path(__file__).parent / "results" / f"lora-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    save(options.out or results, rows, {**about, **{k: v for k, v in vars(options).items() if k != "out"}})
    return 0


class Bench:
    """One pipeline, and how long its steps take."""

    def __init__(self, pipeline: Pipeline, side: int, plan: Plan) -> None:
        self.pipeline = pipeline
        self.side = side
        self.plan = plan
        self.clock = time.perf_counter if pipeline.device == "cuda" else time.process_time

    def measure(self, folder: Path) -> list[Row]:
        """Return every row. Each round takes every kind in turn, so that ratios are of one moment."""
        untouched = self._steps([])  # the first warms up
        untouched = [self._steps([]) for _ in range(self.plan.rounds)]
        paths = [folder / f"{index}.safetensors" for index in range(MAX_COUNT)]
        for seed, path in enumerate(paths):
            self._write(path, seed)
        first, second = Lora(paths[0], 1.0), Lora(paths[1], 1.0)
        loads = [self._first_use(path) for path in paths]
        size = paths[0].stat().st_size / MIB
        kinds: Mapping[str, Callable[[], float]] = {
            "plain": lambda: self._steps([]),
            "one": lambda: self._steps([first]),
            "two": lambda: self._steps([first, second]),
            "switched": lambda: self._switched([[first], [second]]),
            "plain and one": lambda: self._switched([[], [first]]),
            "switch": lambda: self._switch([[first], [second]]),
        }
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(self.plan.rounds + 1):
            for kind, timed in kinds.items():
                found[kind].append(timed())
        found = {kind: samples[1:] for kind, samples in found.items()}  # the first round warms up
        self.pipeline._parts.transformer.unload_lora()
        self.pipeline._adapters = Adapters(self.pipeline._parts.transformer)
        again = [self._steps([]) for _ in range(self.plan.rounds)]

        def ratio(kind: str) -> list[float]:
            return [one / other for one, other in zip(found[kind], found["plain"], strict=True)]

        many = f"with {MAX_COUNT} LoRAs loaded"
        return [
            Row(measure="a step, no LoRA ever used", samples=[*untouched, *again], unit="ms",
                note=f"{self.side} x {self.side}, before and after all that follows"),
            Row(measure=f"a step without LoRA, {many}", samples=found["plain"], unit="ms"),
            Row(measure="… with the same LoRA as before", samples=found["one"], unit="ms",
                note=f"rank {self.plan.rank} on every attention and feed-forward layer"),
            Row(measure="… as a ratio to one without", samples=ratio("one")),
            Row(measure="… with two LoRAs at once, as a ratio", samples=ratio("two")),
            Row(measure="… with another LoRA than the step before", samples=found["switched"], unit="ms"),
            Row(measure="… as a ratio to one without", samples=ratio("switched")),
            Row(measure="… in turn without and with one, as a ratio", samples=ratio("plain and one")),
            Row(measure="the switch alone", samples=found["switch"], unit="ms", note=many),
            Row(measure="first use of a file", samples=loads, unit="ms", digits=1,
                note=f"{size:.1f} MiB, read and attached beside 0 to {MAX_COUNT - 1} others"),
        ]  # fmt: skip

    def _write(self, path: Path, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (wide, out) in linear_shapes(_bare(self.pipeline)).items():
            if name.endswith(LAYERS):
                tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(self.plan.rank, wide, generator=draw) * 0.01
                tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, self.plan.rank, generator=draw) * 0.01
        save_file(tensors, path)

    def _start(self, loras: Sequence[Lora]) -> Run:
        return self.pipeline.start(
            ImageRequest(prompt="a red circle", width=self.side, height=self.side, steps=self.plan.steps,
                         guidance_scale=0.0, seed=1, loras=tuple(loras))
        )  # fmt: skip

    def _timed_ms(self, action: Callable[[], object]) -> float:
        """Return the milliseconds that an action takes, the device's part included."""
        self._settle()
        began = self.clock()
        action()
        self._settle()
        return (self.clock() - began) * 1000

    def _settle(self) -> None:
        if self.pipeline.device == "cuda":
            torch.cuda.synchronize()

    def _steps(self, loras: Sequence[Lora]) -> float:
        """Return the milliseconds of one of a run's steps."""
        return self._switched([loras])

    def _switched(self, choices: Sequence[Sequence[Lora]]) -> float:
        """Return the milliseconds of a step of runs with these LoRAs, which take turns."""
        runs = [self._start(loras) for loras in choices]

        def advance() -> None:
            while not runs[-1].done:
                for run in runs:
                    self.pipeline.step([run])

        took = self._timed_ms(advance) / self.plan.steps / len(runs)
        for run in runs:
            self.pipeline.discard(run)
        return took

    def _switch(self, choices: Sequence[Sequence[Lora]]) -> float:
        """Return the milliseconds of going from one of these to the next, without a step."""
        adapters = self.pipeline._adapters
        blends = [adapters.hold(loras, []) for loras in choices]

        def switch() -> None:
            for _ in range(self.plan.steps):
                for blend in blends:
                    adapters.activate(blend)

        return self._timed_ms(switch) / self.plan.steps / len(blends)

    def _first_use(self, path: Path) -> float:
        held = []
        return self._timed_ms(lambda: held.append(self.pipeline._adapters.hold([Lora(path, 1.0)], [])))


def _bare(pipeline: Pipeline) -> Any:
    """Return the transformer, which has no LoRA yet."""
    return pipeline._parts.transformer


def _about(device: str) -> dict[str, Any]:
    return {**machine(PACKAGES), "gpu": torch.cuda.get_device_name() if device == "cuda" else None}


if __name__ == "__main__":
    raise SystemExit(main())
