"""How the supervisor restarts and gives up; what it does to real children is in tests/faults."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from common.broker import Broker
from common.errors import ConfigurationError
from common.models import load_catalogue
from common.settings import Settings
from tests.servers import eventually
from worker import gpu, supervisor
from worker import slot as slots
from worker.heartbeat import InHand, Stage
from worker.reaper import Burial
from worker.slot import RECYCLE, RECYCLED, Slot
from worker.supervisor import Supervisor, large_enough


def replace_children(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Let the supervisor start this command in place of each worker."""
    real = subprocess.Popen

    def start(_command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real(command, pass_fds=options["pass_fds"])  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(slots.subprocess, "Popen", start)  # type: ignore[attr-defined]


@pytest.fixture
def watcher(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """A supervisor whose children exit at once with code 1."""
    replace_children(monkeypatch, sys.executable, "-c", "raise SystemExit(1)")
    return Supervisor(settings)


@pytest.fixture
def sleeping_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that do nothing until SIGTERM."""
    replace_children(monkeypatch, "sleep", "60")


def crash(watcher: Supervisor, slot: Slot) -> float:
    """Start the slot's child, let it die, and return how long its successor has to wait."""
    slot.restart_at = 0.0
    watcher.tick()
    assert slot.child is not None
    slot.child.process.wait()
    before = time.monotonic()
    watcher.tick()
    return round(slot.restart_at - before, 1)


def test_the_first_restart_is_immediate_and_a_crash_loop_backs_off_to_thirty_seconds(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    assert [crash(watcher, slot) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(("stage", "waits"), [(Stage.LOADING, True), (Stage.IDLE, False)])
def test_time_spent_in_loading_is_no_proof_that_a_worker_can_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sleeping_children: None, stage: Stage, waits: bool
) -> None:
    monkeypatch.setattr(supervisor, "STEADY_S", 0.05)
    watcher = Supervisor(settings)
    (slot,) = watcher.slots
    for _ in range(3):
        slot.restart_at = 0.0
        watcher.tick()
        assert slot.child is not None
        slot.child.heartbeat.at(stage)
        watcher.tick()
        time.sleep(0.1)
        slot.child.process.kill()
        slot.child.process.wait()
        watcher.tick()
    assert (slot.restart_at > time.monotonic() + 1) == waits


def test_a_slot_that_cannot_start_a_child_stops_neither_the_others_nor_the_reaping(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, sleeping_children: None
) -> None:
    watcher = Supervisor(settings.model_copy(update={"workers_per_device": 2}))
    spawn, reaped = supervisor.spawn, []

    def fail_once(*args: object, **options: object) -> object:
        monkeypatch.setattr(supervisor, "spawn", spawn)
        raise OSError("no room for another process")

    def fail() -> None:
        reaped.append(1)
        raise RuntimeError("a command that this Redis refuses")

    monkeypatch.setattr(supervisor, "spawn", fail_once)
    monkeypatch.setattr(watcher._reaper, "tick", fail)
    watcher.tick()
    assert [slot.child is None for slot in watcher.slots] == [True, False]
    assert watcher.slots[0].restart_at > time.monotonic()
    assert reaped == [1]
    monkeypatch.undo()
    end(watcher)


def test_a_child_that_cannot_be_started_leaves_nothing_open(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    watcher = Supervisor(settings)
    watcher.tick()
    before = psutil.Process().num_fds()
    for _ in range(3):
        watcher.slots[0].restart_at = 0.0
        watcher.tick()
    assert psutil.Process().num_fds() == before


def test_a_death_that_a_task_explains_holds_nobody_up_for_long(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    for _ in range(6):
        slot.restart_at = 0.0
        watcher.tick()
        assert slot.child is not None
        slot.child.process.wait()
        slot.child.heartbeat.busy([InHand("poison", 1, math.inf, "run_limit")])
        watcher.tick()
    assert slot.restart_at < time.monotonic() + 1.1


def test_a_child_that_lived_long_starts_afresh(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    for _ in range(4):
        crash(watcher, slot)
    slot.restart_at = 0.0
    watcher.tick()
    assert slot.child is not None
    slot.child.process.wait()
    slot.child.ready_at = time.monotonic() - supervisor.STEADY_S
    watcher.tick()
    assert slot.restart_at <= time.monotonic()


def test_every_incarnation_has_a_name_of_its_own(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    names = []
    for _ in range(3):
        slot.restart_at = 0.0
        watcher.tick()
        assert slot.child is not None
        names.append(slot.child.name)
        slot.child.process.wait()
        watcher.tick()
    assert len(set(names)) == 3


@pytest.mark.parametrize("changes", [{"models": ("nope",)}, {"devices": "9"}, {"storage": "tape"}])
def test_a_wrong_setting_is_told_before_any_child_starts(settings: Settings, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Supervisor(settings.model_copy(update=changes))


def test_a_folder_of_loras_that_is_not_there_is_told_at_the_start(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "nowhere", file):
        with pytest.raises(ConfigurationError, match="ZFLEET_LORA_DIR: there is no folder"):
            Supervisor(settings.model_copy(update={"devices": "cpu", "lora_dir": path}))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """GPUs by index with their memory in MiB, in place of a driver; one that is taken out is lost."""
    there = {"0": 24_564, "1": 81_559}
    monkeypatch.setattr(gpu, "choose", lambda devices: list(there) if devices == "all" else devices.split(","))
    monkeypatch.setattr(gpu, "memory_mb", lambda index: there.get(str(index)))
    monkeypatch.setattr(gpu.Watch, "is_lost", lambda _, index: str(index) not in there)

    def acquire(_: str) -> int:
        if "locked" in there:
            raise BlockingIOError
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(supervisor.devicelock, "acquire", acquire)
    return there


def test_a_gpu_too_small_for_its_models_is_refused_with_both_sizes(gpus: dict[str, int]) -> None:
    catalogue = load_catalogue().select(["pico", "turbo", "base"])
    assert large_enough(["0", "1"], catalogue, skip=False) == ["0", "1"], "turbo and base take turns"
    gpus["0"] = 10_999
    with pytest.raises(ConfigurationError, match=r"GPU 0 has 10999 MiB .* turbo needs 11000 MiB"):
        large_enough(["0", "1"], catalogue, skip=False)
    assert large_enough(["0", "1"], catalogue, skip=True) == ["1"]
    gpus["1"] = 8_000
    with pytest.raises(ConfigurationError, match="10999"):
        large_enough(["0", "1"], catalogue, skip=True)
    gpus["0"] = 16_376
    with pytest.raises(ConfigurationError, match=r"GPU 0 has 16376 MiB .* turbo needs 22900 MiB"):
        large_enough(["0"], catalogue, skip=False, whole=True)
    assert large_enough(["cpu"], catalogue, skip=False) == ["cpu"]


def test_a_lost_gpu_is_reported_and_waited_for(
    gpus: dict[str, int], settings: Settings, broker: Broker, sleeping_children: None
) -> None:
    watcher = Supervisor(settings.model_copy(update={"devices": "all"}))
    watcher.tick()
    first = watcher.slots[0]
    assert first.child is not None
    process = first.child.process
    del gpus["0"]
    watcher._next_report = 0.0
    watcher.tick()
    assert process.wait(5) == -signal.SIGTERM  # asked to drain
    watcher.tick()
    watcher.tick()
    assert first.child is None
    assert [(card.state, card.device) for card in broker.workers()] == [("lost", "cuda:0")]
    gpus["0"] = 24_564
    watcher.tick()
    watcher.tick()
    assert first.child is not None
    end(watcher)


def test_the_cpu_stands_in_for_a_lost_gpu_where_the_setting_says_so(
    gpus: dict[str, int], settings: Settings, sleeping_children: None
) -> None:
    """And is not held to limits that only a GPU can keep."""
    changes = {"devices": "0", "gpu_lost": "cpu", "step_limit_s": 0.05}
    watcher = Supervisor(settings.model_copy(update=changes))
    watcher.tick()
    (slot,) = watcher.slots
    for there, device in ((False, "cpu"), (True, "0")):
        gpus.pop("0", None)
        if there:
            gpus["0"] = 1
        assert slot.child is not None
        process = slot.child.process
        watcher.tick()
        process.wait(5)
        watcher.tick()
        watcher.tick()
        assert slot.child is not None
        assert slot.child.device == device
        slot.child.heartbeat.busy([])
        time.sleep(0.1)
        watcher.tick()
        assert slot.child is not None
        assert slot.child.buried == (device != "cpu")
    end(watcher)


def test_a_gpu_that_another_supervisors_worker_still_has_is_waited_for(
    gpus: dict[str, int], settings: Settings, sleeping_children: None
) -> None:
    gpus["locked"] = 0
    watcher = Supervisor(settings.model_copy(update={"devices": "0"}))
    watcher.tick()
    (slot,) = watcher.slots
    assert slot.child is None
    del gpus["locked"]
    slot.restart_at = 0.0
    watcher.tick()
    assert slot.child is not None
    end(watcher)


def test_memory_that_drifts_recycles_the_child_with_no_back_off(settings: Settings, sleeping_children: None) -> None:
    watcher = Supervisor(settings.model_copy(update={"drift_window_s": 0.6, "drift_warmup_s": 0.0}))
    watcher.tick()
    (slot,) = watcher.slots
    child = slot.child
    assert child is not None
    child.heartbeat.at(Stage.IDLE)
    began = time.monotonic()
    until = began + 5
    while child.process.poll() is None and time.monotonic() < until:
        child.heartbeat.holds_memory(int(1000 * (time.monotonic() - began)))
        watcher._next_look = 0.0
        watcher.tick()
        time.sleep(0.01)
    assert child.process.wait(5) == -RECYCLE
    watcher.tick()
    watcher.tick()
    assert slot.child is not None
    assert (slot.child is not child, slot.backoff_s) == (True, 0.0)
    end(watcher)


def test_a_child_that_leaves_to_be_renewed_is_replaced_with_no_back_off_and_no_alarm(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_children(monkeypatch, sys.executable, "-c", f"raise SystemExit({RECYCLED})")
    watcher = Supervisor(settings)
    (slot,) = watcher.slots
    with capture_logs() as logs:
        assert [crash(watcher, slot) for _ in range(3)] == [0, 0, 0]
    assert slot.backoff_s == 0.0
    assert {line["event"] for line in logs} == {"worker_started", "worker_recycled"}


def test_models_that_come_and_go_are_no_drift(settings: Settings, sleeping_children: None) -> None:
    watcher = Supervisor(settings.model_copy(update={"drift_window_s": 0.4, "drift_warmup_s": 0.0}))
    watcher.tick()
    (slot,) = watcher.slots
    child = slot.child
    assert child is not None
    for models in range(1, 16):
        child.heartbeat.loading()
        child.heartbeat.holds_memory(1000 * models)
        watcher._next_look = 0.0
        watcher.tick()
        child.heartbeat.has_models(map(str, range(models)), models)
        child.heartbeat.at(Stage.IDLE)
        for _ in range(4):
            time.sleep(0.02)
            watcher._next_look = 0.0
            watcher.tick()
    assert child.leave_by is None
    end(watcher)


def test_a_child_whose_swaps_of_models_leak_is_recycled(settings: Settings, sleeping_children: None) -> None:
    watcher = Supervisor(settings.model_copy(update={"drift_window_s": 300.0, "drift_warmup_s": 0.0}))
    watcher.tick()
    (slot,) = watcher.slots
    child = slot.child
    assert child is not None
    for swaps in range(1, 10):
        child.heartbeat.holds_memory(1000 + 100 * swaps)
        child.heartbeat.has_models("ab"[swaps % 2], swaps)
        child.heartbeat.at(Stage.IDLE)
        watcher._next_look = 0.0
        with capture_logs() as logs:
            watcher.tick()
        if child.recycled:
            break
    assert (swaps, child.leave_by) == (8, math.inf)
    assert [(line["event"], line["cause"]) for line in logs] == [("worker_recycled", "device memory")]
    end(watcher)


@pytest.mark.parametrize(
    ("stage", "suspects", "bystanders"),
    [(Stage.BUSY, ["run"], ["stored"]), (Stage.LOADING, ["run"], ["stored"]), (Stage.IDLE, ["stored"], [])],
)
def test_who_is_suspected_of_a_death(
    watcher: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    suspects: list[str],
    bystanders: list[str],
) -> None:
    """Whoever was on the device, or had a model loaded; with nobody there, whoever was being encoded and stored."""
    burials: list[Burial] = []
    monkeypatch.setattr(watcher._reaper, "bury", burials.append)
    watcher.tick()
    child = watcher.slots[0].child
    assert child is not None
    child.heartbeat.storing([InHand("stored", 1, math.inf, "run_limit")])
    child.heartbeat.busy([InHand("run", 1, math.inf, "run_limit")])
    child.heartbeat.at(stage)
    child.process.wait()
    watcher.tick()
    (burial,) = burials
    assert [task.task_id for task in burial.suspects] == suspects
    assert [task.task_id for task in burial.bystanders] == bystanders
    assert burial.crashed


def test_a_child_whose_main_thread_is_gone_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    half_dead = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    replace_children(monkeypatch, sys.executable, "-c", half_dead)
    watcher = Supervisor(settings)
    watcher.tick()
    (slot,) = watcher.slots
    child = slot.child
    assert child is not None
    eventually(child.is_zombie)
    assert child.process.poll() is None
    watcher._next_look = 0.0
    watcher.tick()
    assert (child.process.poll(), child.buried) == (-signal.SIGKILL, True)
    end(watcher)


def end(watcher: Supervisor) -> None:
    watcher.stop()
    assert watcher.run() == 0
