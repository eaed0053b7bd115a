"""The parent of a machine's workers: one child per GPU, restarted when it dies, its runs taken back. No torch."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from common.broker import Broker
from common.errors import RedisUnavailable
from common.records import Reaped
from common.settings import Settings, child_environment
from common.telemetry import get_logger
from worker import gpu
from worker.housekeeping import Housekeeping

log = get_logger()

TICK_S = 0.1
REAP_INTERVAL_S = 1.0
RECONCILE_INTERVAL_S = 30.0
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STEADY_S = 30.0  # a child that lived this long starts its back-off afresh
KILL_MARGIN_S = 10.0  # beyond the drain time, for commits
BAD_CONFIGURATION = 2  # a child's exit code: restarting will not help until somebody mends the settings


@dataclass
class Slot:
    """A device and the child that runs on it."""

    device: str
    index: int
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    parent_pipe: int = -1  # our end; the child drains when it closes
    started: float = 0.0
    backoff_s: float = 0.0
    restart_at: float = 0.0


class Supervisor:
    """Starts, watches and stops the workers of one machine."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigurationError for a model or device that is not there."""
        self.settings = settings
        settings.catalogue()  # a wrong model name is told here, once, and not by every child
        devices = gpu.choose(settings.devices)
        self.slots = [Slot(device, index) for index, device in enumerate(devices * settings.workers_per_device)]
        self._broker = Broker(settings, patience_s=0.0)  # a call that had to wait would reap before the living beat
        self._housekeeping = Housekeeping(settings)
        self._stopping = threading.Event()
        self._dead: list[str] = []  # workers whose runs are still to be taken back
        self._away = True  # as we may have come up together with a Redis that was
        self._next_reap = self._next_reconcile = 0.0

    def stop(self) -> None:
        """Ask for a drain; safe from a signal handler."""
        self._stopping.set()

    def run(self) -> int:
        """Watch over the children until stopped; returns the process's exit code."""
        log.info("supervisor_started", devices=[slot.device for slot in self.slots], models=list(self.settings.models))
        self._housekeeping.start()
        while not self._stopping.wait(TICK_S):
            for slot in self.slots:
                self._watch(slot)
            self._take_back()
        self._housekeeping.stop()
        self._drain()
        log.info("supervisor_stopped")
        return 0

    def _watch(self, slot: Slot) -> None:
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.restart_at:
                self._start(slot)
            return
        code = slot.process.poll()
        if code is None:
            return
        lived = now - slot.started
        if code == BAD_CONFIGURATION:
            slot.backoff_s = LONGEST_BACKOFF_S
        elif lived >= STEADY_S:
            slot.backoff_s = 0.0
        log.warning("worker_died", worker=slot.name, gpu=slot.device, exit_code=code, restart_in_s=slot.backoff_s)
        self._bury(slot)
        slot.restart_at = now + slot.backoff_s
        slot.backoff_s = min(LONGEST_BACKOFF_S, max(FIRST_BACKOFF_S, slot.backoff_s * 2))

    def _start(self, slot: Slot) -> None:
        slot.name = f"{_host()}.{'cpu' if slot.device == gpu.CPU else 'gpu'}{slot.index}.{secrets.token_hex(3)}"
        child_end, slot.parent_pipe = os.pipe()
        command = [sys.executable, "-m", "worker", "child", slot.name, slot.device, str(child_end)]
        slot.process = subprocess.Popen(
            command, env=self._environment(slot), pass_fds=(child_end,), stdin=subprocess.DEVNULL
        )
        os.close(child_end)
        slot.started = time.monotonic()
        log.info("worker_started", worker=slot.name, gpu=slot.device, pid=slot.process.pid)

    def _environment(self, slot: Slot) -> dict[str, str]:
        if slot.device == gpu.CPU:
            share = max(1, (os.cpu_count() or 1) // len(self.slots))
            threads = str(self.settings.cpu_threads or share)
            return child_environment(self.settings, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=threads)
        # NVML counts by bus order, so CUDA must as well, or we would watch one GPU and use another
        return child_environment(self.settings, CUDA_VISIBLE_DEVICES=slot.device, CUDA_DEVICE_ORDER="PCI_BUS_ID")

    def _bury(self, slot: Slot) -> None:
        os.close(slot.parent_pipe)
        self._dead.append(slot.name)
        slot.process = None
        self._take_back()

    def _take_back(self) -> None:
        now = time.monotonic()
        try:
            if self._away:
                self._broker.probe()
                self._away = False
                # every lease may have run out meanwhile: let the living renew theirs before any is reaped
                self._next_reap = self._next_reconcile = now + self.settings.lease_s
            while self._dead:
                self._log(self._broker.reap(self._dead[0]))
                self._dead.pop(0)
            if now >= self._next_reap:
                self._next_reap = now + REAP_INTERVAL_S
                self._log(self._broker.reap())
            if now >= self._next_reconcile:
                self._next_reconcile = now + RECONCILE_INTERVAL_S
                for task_id in self._broker.reconcile():
                    log.warning("task_put_back", task_id=task_id)
        except RedisUnavailable:
            if not self._away:
                log.warning("redis_away")
            self._away = True

    def _log(self, reaped: list[Reaped]) -> None:
        for task_id, outcome, worker, request_id in reaped:
            log.warning("task_reaped", task_id=task_id, outcome=outcome, worker=worker, request_id=request_id)

    def _drain(self) -> None:
        living = [slot for slot in self.slots if slot.process]
        for slot in living:
            assert slot.process
            slot.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self.settings.drain_s + KILL_MARGIN_S
        for slot in living:
            assert slot.process
            try:
                slot.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker_killed", worker=slot.name, cause="drain took too long")
                slot.process.kill()
                slot.process.wait()
            self._bury(slot)


def _host() -> str:
    """Return this machine's name in the letters that storage keys and RQ names allow."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:40] or "host"
