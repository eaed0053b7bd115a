"""Workers and their supervisors are killed, frozen and restarted while load runs: the books balance."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.faults.books import Mix
from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG, Rig, assert_balanced, sabotage, workers_of

KILLS = 300 if LONG else 100
KILL_EVERY_S = 0.5
LOAD_MS = 200.0
RESTART_S = 1.0  # beside the model's load


class Executioner:
    """Kills ready workers of one supervisor by chance, and times how long their slots stay empty."""

    def __init__(self, rig: Rig, pid_of_supervisor: int) -> None:
        self._rig = rig
        self.kills = 0
        self.recovery_s: list[float] = []
        self._empty: dict[str, tuple[str, float]] = {}  # slot -> the dead worker's name, when it was killed

    def kill_one(self) -> None:
        victims = [card for card in self._rig.ready() if slot(card.name) not in self._empty]
        if victims:
            victim = random.choice(victims)
            os.kill(victim.pid, signal.SIGKILL)
            self.kills += 1
            self._empty[slot(victim.name)] = (victim.name, time.monotonic())

    def watch(self, until: float) -> None:
        while (now := time.monotonic()) < until:
            for card in self._rig.ready():
                dead, killed_at = self._empty.get(slot(card.name), (card.name, now))
                if dead != card.name:
                    self.recovery_s.append(now - killed_at)
                    del self._empty[slot(card.name)]
            time.sleep(0.02)


def slot(worker: str) -> str:
    """Return what a worker's successors share with it: its name without the incarnation."""
    return worker.rpartition(".")[0]


@pytest.mark.timeout(900 if LONG else 300)
def test_killed_workers(tmp_path: Path, note: NoteFn) -> None:
    mix = Mix(cancel_share=0.05, deadline_share=0.05, deadline_s=0.2)
    with Rig(tmp_path, workers_per_device=4, simulated_load_ms=LOAD_MS) as rig:
        supervisor = rig.supervise(environment=sabotage("steady"))
        executioner = Executioner(rig, supervisor.pid)
        with rig.load(rate_s=8, mix=mix) as load:
            while executioner.kills < KILLS:
                executioner.kill_one()
                executioner.watch(time.monotonic() + KILL_EVERY_S)
            executioner.watch(time.monotonic() + 3)
        report = rig.close_books(load)
        note("kill -9 of a worker", executioner.kills, report, executioner.recovery_s)
        assert statistics.median(executioner.recovery_s) <= RESTART_S + LOAD_MS / 1000
        assert len(workers_of(supervisor)) == 4
        assert_balanced(report)
