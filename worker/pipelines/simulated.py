"""A stand-in for a GPU in load and fault tests: it takes a set time per step and draws a gradient. No torch.

With the option `faults` in the models file it also fails as GPUs do, for prompts that say so: `[crash]` kills the
worker, `[hang]` never returns from a step, `[oom]` does not fit into memory, `[crowded]` not beside others, `[lost]`
takes the device with it, `[leak]` keeps LEAK_MB more at every step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import DeviceFailed, OutOfMemory
from worker.pipelines.base import BasePipeline, ImageRequest, Run

DEFAULT_IMAGE_MS = 320.0  # for all steps of a picture together
DEFAULT_LOAD_MS = 0.0
IN_TIME_S = 0.005  # a caller back this soon kept the device busy: a GPU has work queued up meanwhile
LEAK_MB = 50
CATCH_UP_S = 0.1  # a sleep that overshot by more was no slow timer but a stopped process, and that time is lost


class Pipeline(BasePipeline):
    """One step of a batch takes `image_ms / steps` of whichever run has the longest steps, `image_ms` being that option
    and `megapixel_ms` for each megapixel.

    Steps follow an absolute schedule while the caller keeps up, so that late timers do not add up over a test.
    """

    _ends = 0.0  # time.monotonic() at which the last step was due to end
    _woke = 0.0  # and at which it really did
    _leaked: bytes = b""

    def load(self) -> None:
        """Wait `load_ms`."""
        time.sleep(self._option("load_ms", DEFAULT_LOAD_MS) / 1000)

    def warm(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Return at once: there is no device to warm."""

    def start(self, request: ImageRequest) -> Run:
        """Return a run; it holds nothing."""
        return Run(request=request)

    def step(self, runs: Sequence[Run]) -> None:
        """Wait as long as one step of this batch takes, then count it."""
        if not runs:
            return
        if self.spec.options.get("faults"):
            self._go_wrong(runs)
        now = time.monotonic()
        begins = max(self._ends, now - CATCH_UP_S) if now - self._woke <= IN_TIME_S else now
        self._ends = begins + max(self._image_s(run.request) / run.request.steps for run in runs)
        time.sleep(max(0.0, self._ends - now))
        self._woke = time.monotonic()
        for run in runs:
            run.step += 1

    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Return a gradient (height, width, 3) between four corner colours that the seed chooses."""
        return _gradient(run.request.height, run.request.width, run.request.seed)

    def preview(self, run: Run) -> NDArray[np.uint8]:
        """Return the same gradient, an eighth as large."""
        return _gradient(run.request.height // 8, run.request.width // 8, run.request.seed)

    def unload(self) -> int:
        """Return how much it has leaked, which is still there."""
        return len(self._leaked)

    def _go_wrong(self, runs: Sequence[Run]) -> None:
        for prompt in (run.request.prompt for run in runs):
            if "[crash]" in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if "[hang]" in prompt:
                threading.Event().wait()
            if "[oom]" in prompt or ("[crowded]" in prompt and len(runs) > 1):
                raise OutOfMemory("the simulated device has no memory left for this picture")
            if "[lost]" in prompt:
                raise DeviceFailed("the simulated device has failed")
            if "[leak]" in prompt:
                self._leaked += os.urandom(1 << 20) * LEAK_MB

    def _image_s(self, request: ImageRequest) -> float:
        megapixels = request.width * request.height / 1e6
        by_size_ms = self._option("megapixel_ms", 0.0) * megapixels
        return (self._option("image_ms", DEFAULT_IMAGE_MS) + by_size_ms) / 1000

    def _option(self, name: str, default: float) -> float:
        return float(self.spec.options.get(name, default))


def _gradient(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    corners = np.random.default_rng(abs(seed)).uniform(0, 255, (2, 2, 3))
    down = np.linspace(0, 1, height)[:, None, None]
    across = np.linspace(0, 1, width)[None, :, None]
    left = corners[0, 0] * (1 - down) + corners[1, 0] * down
    right = corners[0, 1] * (1 - down) + corners[1, 1] * down
    picture: NDArray[np.uint8] = (left * (1 - across) + right * across).astype(np.uint8)
    return picture
