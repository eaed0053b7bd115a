"""The parent of a machine's workers: one child per GPU, watched over, restarted when it dies or has to. No torch."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from common.broker import Broker
from common.cards import WorkerCard
from common.errors import ConfigurationError, RedisUnavailable
from common.models import Catalogue
from common.servicemanager import service_manager
from common.settings import Settings, child_environment
from common.storage import open_storage
from common.telemetry import get_logger
from worker import devicelock, gpu, gpulog
from worker.drift import Drift
from worker.heartbeat import InHand
from worker.housekeeping import Housekeeping
from worker.reaper import Burial, Reaper
from worker.slot import BAD_CONFIGURATION, RECYCLE, RECYCLED, Child, Slot, spawn
from worker.watchdog import Stall, stall

log = get_logger()

TICK_S = 0.1
LOOK_INTERVAL_S = 1.0  # at what changes slowly: zombies, memory
GPU_INTERVAL_S = 5.0  # at the GPUs: whether they are still there, and a line of gpu.csv each
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STEADY_S = 30.0  # a child that was ready this long, or has made a picture, starts its back-off afresh
KILL_MARGIN_S = 10.0  # beyond the drain time, for commits
KILL_WAIT_S = 1.0  # a process that the kernel cannot end at once will at least do nothing more
LATE = Stall("drain took too long", blame=False)


class Supervisor:
    """Starts, watches and stops the workers of one machine."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigurationError for a model, device or folder of LoRAs that is not there, or a GPU too small."""
        self.settings = settings
        catalogue = settings.catalogue()  # a wrong model name is told here, once, and not by every child
        settings.models_to_keep()  # and so are these
        settings.sizes_to_warm()
        if settings.lora_dir and not settings.lora_dir.is_dir():
            raise ConfigurationError(f"ZFLEET_LORA_DIR: there is no folder {settings.lora_dir}; make it, or unset it")
        devices = large_enough(
            gpu.choose(settings.devices),
            catalogue,
            skip=settings.devices == "all",
            whole=settings.offload == "none",
        )
        self.slots = [
            Slot(nth * len(devices) + index, device, device, nth)
            for nth in range(settings.workers_per_device)
            for index, device in enumerate(devices)
        ]
        self._broker = Broker(settings, patience_s=0.0)  # never waits for a Redis that is away
        self._reaper = Reaper(self._broker, open_storage(settings))
        self._housekeeping = Housekeeping(settings)
        self._manager = service_manager(settings.alive_file)
        gpus = [int(device) for device in devices if device != gpu.CPU]
        looked = gpulog.keeper(settings.log_dir if gpus else None)
        self._gpus = gpu.Watch(gpus, every_s=GPU_INTERVAL_S, looked=looked)
        self._stopping = False  # a bare flag: a handler that runs within Event.wait cannot set that event
        self._next_look = self._next_report = 0.0

    def stop(self) -> None:
        """Ask for a drain; safe from a signal handler."""
        self._stopping = True

    def run(self) -> int:
        """Watch over the children until stopped; returns the process's exit code."""
        log.info("supervisor_started", devices=[slot.home for slot in self.slots], models=list(self.settings.models))
        self._housekeeping.start()
        self._gpus.start()
        while not self._stopping:
            time.sleep(TICK_S)
            self.tick()
        self._manager.stopping()
        self._housekeeping.stop()
        self._drain()
        self._reaper.finish()
        log.info("supervisor_stopped")
        return 0

    def tick(self) -> None:
        """Look after every child once."""
        now = time.monotonic()
        look = now >= self._next_look
        if look:
            self._next_look = now + LOOK_INTERVAL_S
        for slot in self.slots:
            try:
                self._look_after(slot, look=look)
            except Exception as error:  # no room for another process, say: the other slots are still ours to watch
                log.error("slot_failed", gpu=slot.home, error=type(error).__name__, message=str(error))
                slot.restart_at = now + FIRST_BACKOFF_S
        try:
            if now >= self._next_report:
                self._next_report = now + self.settings.beat_s
                self._report_lost()
            self._reaper.tick()
        except Exception as error:  # as where Redis refuses a command: our workers go on
            log.error("reaping_failed", error=type(error).__name__, message=str(error))
        self._give_sign_of_life()

    def _give_sign_of_life(self) -> None:
        """Tell systemd that this loop turns; from elsewhere a supervisor that hangs would be taken for a sound one."""
        ready = sum(1 for slot in self.slots if slot.child and slot.child.ready_at is not None)
        if ready:
            self._manager.ready()
        self._manager.alive(f"{ready} of {len(self.slots)} workers ready")

    def _look_after(self, slot: Slot, *, look: bool) -> None:
        if slot.home != gpu.CPU:
            self._look_at_gpu(slot)
        if slot.child is not None:
            self._watch(slot, slot.child, look=look)
        elif time.monotonic() >= slot.restart_at and not (slot.lost and slot.device == slot.home):
            self._start(slot)

    # A child's life

    def _start(self, slot: Slot) -> None:
        if slot.home != gpu.CPU and slot.lock is None:
            try:
                slot.lock = devicelock.acquire(f"{slot.home}.{slot.nth}")
            except BlockingIOError:
                log.warning("gpu_in_use", gpu=slot.home, by="another supervisor's worker")
                slot.restart_at = time.monotonic() + FIRST_BACKOFF_S
                return
            except OSError as error:
                log.warning("gpu_not_locked", gpu=slot.home, error=str(error))
        name = f"{_host()}.{slot.place}.{secrets.token_hex(3)}"
        drift = Drift(
            limit_mb=self.settings.drift_mb,
            window_s=self.settings.drift_window_s,
            warmup_s=self.settings.drift_warmup_s,
        )
        inherit = [] if slot.lock is None else [slot.lock]
        slot.child = spawn(name, slot.device, environment=self._environment(slot), drift=drift, inherit=inherit)
        log.info("worker_started", worker=name, gpu=slot.device, pid=slot.child.process.pid)

    def _environment(self, slot: Slot) -> dict[str, str]:
        settings = self._settings_on(slot.device, slot)
        if slot.device != gpu.CPU:
            # NVML counts by bus order, so CUDA must as well, or we would watch one GPU and use another
            return child_environment(settings, CUDA_VISIBLE_DEVICES=slot.device, CUDA_DEVICE_ORDER="PCI_BUS_ID")
        share = max(1, (os.cpu_count() or 1) // len(self.slots))
        threads = str(settings.cpu_threads or share)
        return child_environment(settings, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=threads)

    def _settings_on(self, device: str, slot: Slot) -> Settings:
        if device == slot.home:
            return self.settings
        # the CPU stands in for a GPU, whose limits it cannot keep
        changes = {"run_limits": False, "step_limit_s": self.settings.load_limit_s}
        return self.settings.model_copy(update=changes)

    def _watch(self, slot: Slot, child: Child, *, look: bool) -> None:
        code = child.process.poll()
        if code is not None:
            self._ended(slot, child, code)
            return
        if child.buried:
            return  # killed, and not gone yet
        now = time.monotonic()
        stalled = stall(child.watch(), self._settings_on(child.device, slot))
        if stalled:
            self._kill(child, stalled)
        elif child.leave_by is not None and now > child.leave_by:
            self._kill(child, LATE)
        elif look and child.is_zombie():
            self._kill(child, Stall("zombie", blame=False))
        elif look and child.leave_by is None:
            self._look_at_memory(child)

    def _look_at_memory(self, child: Child) -> None:
        age_s = child.age_s()
        if age_s is None or not child.drift.due(age_s):
            return
        sample = child.memory()
        grown = child.drift.grown(age_s, sample) if sample else None
        if grown:
            log.warning("worker_recycled", worker=child.name, cause=f"{grown.what} memory", grown_mb=grown.mb)
            child.recycled = True
            child.leave_by = math.inf  # between runs: the watchdog still sees to it that these end
            child.process.send_signal(RECYCLE)

    def _ask_to_leave(self, child: Child) -> None:
        child.leave_by = time.monotonic() + self.settings.drain_s + KILL_MARGIN_S
        child.process.send_signal(signal.SIGTERM)

    def _kill(self, child: Child, stalled: Stall) -> None:
        log.warning("worker_killed", worker=child.name, gpu=child.device, cause=stalled.cause)
        for task in stalled.tripped:
            log.warning("fuse_tripped", **task.about, cause=task.cause, worker=child.name)
        child.process.kill()
        try:
            child.process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            log.error("worker_will_not_die", worker=child.name, pid=child.process.pid)
        self._bury(child, stalled.tripped, blame=stalled.blame)

    def _ended(self, slot: Slot, child: Child, code: int) -> None:
        now = time.monotonic()
        if code == RECYCLED:
            log.warning("worker_recycled", worker=child.name, cause="its own wish")
            child.recycled = True
        if code == BAD_CONFIGURATION:
            slot.backoff_s = LONGEST_BACKOFF_S
        elif child.recycled or child.is_sound(STEADY_S):
            slot.backoff_s = 0.0
        if not child.recycled:
            log.warning("worker_died", worker=child.name, gpu=child.device, exit_code=code, restart_in_s=slot.backoff_s)
        self._bury(child, crashed=not child.recycled and child.leave_by is None)
        # a death that a task explains may repeat until that is quarantined, and the others should not wait for ever
        longest_s = FIRST_BACKOFF_S if child.has_suspects() else LONGEST_BACKOFF_S
        child.close()
        slot.child = None
        slot.restart_at = now + slot.backoff_s
        if not child.recycled:
            slot.backoff_s = min(longest_s, max(FIRST_BACKOFF_S, slot.backoff_s * 2))

    def _bury(self, child: Child, tripped: Sequence[InHand] = (), *, blame: bool = True, crashed: bool = True) -> None:
        if child.buried:
            return
        child.buried = True
        last = child.heartbeat.read()
        suspects, bystanders = last.on_device, last.in_store
        if not suspects:
            suspects, bystanders = bystanders, ()  # it died of encoding or storing a picture
        others = [task for task in suspects if task not in tripped]
        burial = Burial(child.name, others if blame else (), bystanders if blame else (), tripped, crashed)
        self._reaper.bury(burial)

    # A GPU that is lost, and found

    def _look_at_gpu(self, slot: Slot) -> None:
        lost = self._gpus.is_lost(int(slot.home))
        if lost == slot.lost:
            return
        slot.lost = lost
        slot.device = gpu.CPU if lost and self.settings.gpu_lost == "cpu" else slot.home
        slot.backoff_s = slot.restart_at = 0.0
        if lost:
            log.error("gpu_lost", gpu=slot.home, until_it_is_back=self.settings.gpu_lost)
        else:
            log.info("gpu_back", gpu=slot.home)
        child = slot.child
        if child and child.leave_by is None and (lost or child.device != slot.device):
            child.recycled = True
            self._ask_to_leave(child)

    def _report_lost(self) -> None:
        now = datetime.now(UTC)
        for slot in self.slots:
            if slot.lost:
                card = WorkerCard(
                    name=f"{_host()}.gpu{slot.home}.lost", host=socket.gethostname(), pid=os.getpid(), state="lost",
                    device=f"cuda:{slot.home}", models=[], models_loaded=[], capacity=0, running=[], images_done=0,
                    rss_mb=0, started_at=now, seen_at=now,
                )  # fmt: skip
                with contextlib.suppress(RedisUnavailable):  # the reaper tells
                    self._broker.beat(card, [], 1)

    # The end

    def _drain(self) -> None:
        for slot in self.slots:
            if slot.child:
                self._ask_to_leave(slot.child)
        while living := [slot for slot in self.slots if slot.child]:
            for slot in living:
                assert slot.child
                self._see_off(slot, slot.child)
            self._manager.alive(f"{len(living)} workers drain")
            time.sleep(TICK_S / 10)

    def _see_off(self, slot: Slot, child: Child) -> None:
        if child.process.poll() is not None:
            self._bury(child, crashed=False)
            child.close()
            slot.child = None
        elif child.buried:
            slot.child = None  # killed, and the kernel cannot end it
        else:
            self._watch(slot, child, look=False)


def large_enough(devices: Sequence[str], catalogue: Catalogue, *, skip: bool, whole: bool = False) -> list[str]:
    """Return the devices that can hold the largest model of the catalogue: where not all fit at once they take turns.

    With `whole` no part of a model may wait in the machine's memory. Raises ConfigurationError, saying both sizes, for
    the first GPU that cannot; with `skip`, only if no device is left.
    """
    needs = {
        spec.name: spec.memory_mb if whole or spec.least_mb is None else spec.least_mb for spec in catalogue.values()
    }
    largest, needed = max(needs.items(), key=lambda need: need[1])
    fitting, refusals = [], []
    for device in devices:
        total = None if device == gpu.CPU else gpu.memory_mb(int(device))
        if total is None or total >= needed:
            fitting.append(device)
        else:
            refusals.append(f"GPU {device} has {total} MiB of memory, but {largest} needs {needed} MiB")
    if refusals and (not skip or not fitting):
        raise ConfigurationError(f"{refusals[0]}; serve a smaller model on it, or leave it out of ZFLEET_DEVICES")
    for refusal in refusals:
        log.error("gpu_left_out", reason=refusal)
    return fitting


def _host() -> str:
    """Return this machine's name in the letters that storage keys and RQ names allow."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:40] or "host"
