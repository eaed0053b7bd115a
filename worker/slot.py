"""A place for one worker: a device, and the child process that runs there now."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from worker.drift import Drift, Sample
from worker.gpu import CPU
from worker.heartbeat import Heartbeat, Reading, Stage, shared_file

MIB = 1024 * 1024
BAD_CONFIGURATION = 2  # a child's exit code: restarting will not help until somebody mends the settings
RECYCLED = 4  # and another: it left of its own accord, having finished what had begun, to make room for a fresh one
RECYCLE = signal.SIGUSR1  # asks a child to finish all that has begun, however long it takes, and leave


@dataclass
class Child:
    """One incarnation of a worker: its process, our end of its pipe, and what it tells of itself."""

    name: str
    device: str
    process: subprocess.Popen[bytes]
    pipe: int  # the child drains when it closes
    heartbeat: Heartbeat
    drift: Drift
    ready_at: float | None = None
    leave_by: float | None = None  # set once it has been asked to drain
    recycled: bool = False  # it was asked to drain, or did so itself, to make room for a fresh one
    models_changed: int = 0  # how often models had come or gone when its memory was last looked at
    buried: bool = False  # what it held is taken back

    def watch(self) -> Reading:
        """Return what it is at."""
        reading = self.heartbeat.read()
        if self.ready_at is None and reading.stage in (Stage.IDLE, Stage.BUSY):
            self.ready_at = time.monotonic()
        return reading

    def is_sound(self, steady_s: float) -> bool:
        """Whether it has proved that a worker can run here: by work, or by being ready for so long."""
        if self.heartbeat.read().done:
            return True
        return self.ready_at is not None and time.monotonic() - self.ready_at >= steady_s

    def has_suspects(self) -> bool:
        """Whether it was at some task, and so may have died of it."""
        reading = self.heartbeat.read()
        return bool(reading.on_device or reading.in_store)

    def age_s(self) -> float | None:
        """Return for how long it has been ready; None while it is not, or a model comes or goes."""
        reading = self.heartbeat.read()
        if self.ready_at is None or reading.stage is Stage.LOADING:
            return None
        age_s = time.monotonic() - self.ready_at
        if reading.models_changed != self.models_changed:
            self.models_changed = reading.models_changed
            self.drift.restart(age_s, reading.models)
        return age_s

    def memory(self) -> Sample | None:
        """Return its memory in MiB, or None if it is just going."""
        try:
            rss = psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return None
        return Sample(rss / MIB, self.heartbeat.read().device_mb)

    def is_zombie(self) -> bool:
        """Whether its main thread is gone while others hold on, so that it neither works nor ends."""
        try:
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def close(self) -> None:
        """Let go of what we shared with it."""
        self.heartbeat.close()
        with contextlib.suppress(OSError):
            os.close(self.pipe)


@dataclass
class Slot:
    """A device and what is known of its workers. `device` is where the next one starts."""

    index: int
    home: str  # the device it is for: a GPU's index, or cpu
    device: str
    nth: int = 0  # of the slots that share this device
    child: Child | None = None
    backoff_s: float = 0.0
    restart_at: float = 0.0
    lock: int | None = None  # on the GPU
    lost: bool = False  # the GPU is gone

    @property
    def place(self) -> str:
        """What its workers are called by beside the host, as gpu1: by the GPU, as each may have its own supervisor."""
        if self.home == CPU:
            return f"{CPU}{self.index}"
        beside = f"-{self.nth}" if self.nth else ""
        return f"{CPU if self.device == CPU else 'gpu'}{self.home}{beside}"


def spawn(name: str, device: str, *, environment: Mapping[str, str], drift: Drift, inherit: Sequence[int]) -> Child:
    """Start a worker: exec, never fork, so that no child ever shares a CUDA context."""
    theirs, ours = os.pipe()
    shared = shared_file()
    heartbeat = Heartbeat(shared)
    heartbeat.at(Stage.STARTING)
    command = [sys.executable, "-m", "worker", "child", name, device, str(theirs), str(shared)]
    try:
        process = subprocess.Popen(
            command, env=dict(environment), pass_fds=(theirs, shared, *inherit), stdin=subprocess.DEVNULL
        )
    except BaseException:
        os.close(ours)
        heartbeat.close()
        raise
    finally:
        os.close(theirs)
        os.close(shared)
    return Child(name=name, device=device, process=process, pipe=ours, heartbeat=heartbeat, drift=drift)
