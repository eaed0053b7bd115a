"""A worker child without its supervisor that notes when each picture's first step begins: `-m bench.clocked_worker`.

Everything else is the worker's own code. With `plain`, a step of the simulated model sleeps its full time, as a job of
stock RQ does, rather than keeping to a schedule that forgives up to 5 ms between two steps.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.settings import load_settings
from worker import gpu_worker
from worker.pipelines import simulated
from worker.pipelines.base import Run


def main(file: str, mode: str) -> int:
    """Work until SIGTERM; writes a line `<seed> <time.monotonic()>` to `file` for each picture that begins."""
    with Path(file).open("a", buffering=1, encoding="utf-8") as clock:
        untouched: Any = simulated.Pipeline.step

        def step(self: simulated.Pipeline, runs: Sequence[Run]) -> None:
            now = time.monotonic()
            for run in runs:
                if run.step == 0:
                    clock.write(f"{run.request.seed} {now!r}\n")
            untouched(self, runs)

        simulated.Pipeline.step = step  # type: ignore[method-assign]
        if mode == "plain":
            simulated.IN_TIME_S = -1.0  # nobody is ever back in time, so each step begins when it is asked for
        return gpu_worker.main(f"bench.{os.getpid()}", "cpu", load_settings(), None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
