"""Workers and their supervisors are killed, frozen and restarted while load runs: the books balance."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.cards import WorkerCard
from common.schemas import TaskStatus
from tests.faults.books import Mix
from tests.faults.conftest import NoteFn
from tests.faults.rig import LEASE_S, LONG, START_S, Rig, frozen, within, workers_of
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import WorkerServer, eventually

KILLS = 300 if LONG else 100
KILLS_TIMED = 12
KILL_EVERY_S = 0.5
LOAD_MS = 200.0
RESTART_S = 1.0  # beside the model's load
HOSTS_LOST = 5 if LONG else 1
FREEZES = 8 if LONG else 2
ROUNDS = 3 if LONG else 1
ELSEWHERE_S = LEASE_S + 5.0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A fleet whose pictures take long enough to be met halfway."""
    with Rig(tmp_path, simulated_image_ms=400.0) as rig:
        yield rig


class Executioner:
    """Kills ready workers by chance, and times how long their slots stay empty."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.kills = 0
        self.recovery_s: list[float] = []
        self._empty: dict[str, tuple[str, float]] = {}  # slot -> the dead worker's name, and when it was killed

    def kill_one(self) -> None:
        victims = [card for card in self._rig.ready() if slot(card.name) not in self._empty]
        if victims:
            victim = random.choice(victims)
            os.kill(victim.pid, signal.SIGKILL)
            self.kills += 1
            self._empty[slot(victim.name)] = (victim.name, time.monotonic())

    def kill(self, times: int) -> None:
        """Kill so many, one after the other, and wait until the last of them is replaced as well."""
        while self.kills < times:
            self.kill_one()
            self.watch(time.monotonic() + KILL_EVERY_S)
        given_up = time.monotonic() + START_S
        while self._empty and time.monotonic() < given_up:
            self.watch(time.monotonic() + KILL_EVERY_S)

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


def held_by(rig: Rig, workers: set[str]) -> set[str]:
    """Return the tasks that run on these workers now."""
    ids = {task_id for card in rig.broker.workers() if card.name in workers for task_id in card.running}
    return {task_id for task_id in ids if running_on(rig, task_id) in workers}


def running_on(rig: Rig, task_id: str) -> str | None:
    task = record(rig.broker, task_id)
    return task.attempts[-1].worker if task.status is TaskStatus.RUNNING else None


@pytest.mark.timeout(900 if LONG else 300)
def test_killed_workers(tmp_path: Path, note: NoteFn) -> None:
    mix = Mix(cancel_share=0.05, deadline_share=0.05, deadline_s=0.2)
    with Rig(tmp_path, workers_per_device=4, simulated_load_ms=LOAD_MS) as rig:
        supervisor = rig.supervise()
        executioner = Executioner(rig)
        with rig.load(rate_s=8, mix=mix) as load:
            executioner.kill(KILLS)
        report = rig.close_books(load)
        note("kill -9 of a worker", executioner.kills, report, executioner.recovery_s)
        assert len(executioner.recovery_s) == KILLS
        assert len(workers_of(supervisor)) == 4
        assert report.balanced, report
        if LONG:
            assert statistics.median(executioner.recovery_s) <= RESTART_S + LOAD_MS / 1000


@pytest.mark.alone
def test_killed_workers_are_soon_replaced(tmp_path: Path) -> None:
    with Rig(tmp_path, workers_per_device=4, simulated_load_ms=LOAD_MS) as rig:
        rig.supervise()
        executioner = Executioner(rig)
        with rig.load(rate_s=8):
            executioner.kill(KILLS_TIMED)
        assert statistics.median(executioner.recovery_s) <= RESTART_S + LOAD_MS / 1000
        assert len(executioner.recovery_s) == KILLS_TIMED


@pytest.mark.alone
def test_a_worker_killed_again_and_again_at_work_is_replaced_as_fast(rig: Rig) -> None:
    rig.supervise(workers_per_device=1)
    executioner = Executioner(rig)
    for kills in range(1, 4):
        await_final(rig.broker, submit_many(rig.broker, 1))
        executioner.kill_one()
        while len(executioner.recovery_s) < kills:
            executioner.watch(time.monotonic() + 0.1)
    assert max(executioner.recovery_s) <= RESTART_S * 1.5, executioner.recovery_s


def test_killed_hosts(rig: Rig, note: NoteFn) -> None:
    """A supervisor and its workers vanish together, so that nobody is left to tell; another one stands in."""
    doomed, recovery_s = rig.supervise(), []
    names = {card.name for card in rig.ready()}
    with rig.load(rate_s=5) as load:
        for _ in range(HOSTS_LOST):
            spare = rig.supervise()
            spare_names = {card.name for card in rig.ready()} - names
            eventually(lambda: held_by(rig, names), within_s=20)  # noqa: B023 (called at once)
            rig.kill_host(doomed)
            tasks = held_by(rig, names)
            recovery_s.append(within(lambda: not held_by(rig, names), ELSEWHERE_S))  # noqa: B023
            for task_id in tasks:
                within(lambda: running_on(rig, task_id) not in names, ELSEWHERE_S)  # noqa: B023
            doomed, names = spare, spare_names
    report = rig.close_books(load)
    note("kill -9 of a supervisor and all its workers", HOSTS_LOST, report, recovery_s)
    assert report.balanced, report


def test_frozen_workers(rig: Rig, note: NoteFn) -> None:
    """SIGSTOP past the lease, SIGCONT when another has finished: the late result is refused and its files removed."""
    rig.supervise()
    refused, recovery_s = 0, []
    # one step, so that it is done when the worker thaws; one priority, so that what is taken back is next in line
    mix = Mix(steps=(1,), pictures=(1,), priorities=("normal",))
    with rig.load(rate_s=2, mix=mix) as load:
        for _ in range(FREEZES):
            victim, tasks = busy_worker(rig)
            with frozen(victim.pid):
                tasks = {task_id for task_id in tasks if running_on(rig, task_id) == victim.name}
                recovery_s.append(within(lambda: not held_by(rig, {victim.name}), ELSEWHERE_S))  # noqa: B023
                await_final(rig.broker, tasks)
            eventually(lambda: victim.name in [card.name for card in rig.ready()])  # noqa: B023
            outcomes = [[attempt.outcome for attempt in record(rig.broker, task_id).attempts] for task_id in tasks]
            refused += sum(told == ["lost", "succeeded"] for told in outcomes)
    report = rig.close_books(load)
    note("SIGSTOP of a worker past its lease, then SIGCONT", FREEZES, report, recovery_s)
    assert refused >= FREEZES, report
    assert '"outcome":"lost"' in rig.log(0), "no finished picture came late"
    assert set(report.outcomes) <= {"succeeded", "lost", "released"}, report
    assert report.balanced, report


def busy_worker(rig: Rig) -> tuple[WorkerCard, set[str]]:
    """Wait for a worker that holds a task; returns it with its tasks."""
    found: list[tuple[WorkerCard, set[str]]] = []

    def find() -> bool:
        found[:] = [(card, held) for card in rig.ready() if (held := held_by(rig, {card.name}))]
        return bool(found)

    eventually(find, within_s=20)
    return random.choice(found)


def test_rolling_restart(rig: Rig, note: NoteFn) -> None:
    """SIGTERM to one supervisor after the other: nothing fails, and no attempt is burned."""
    supervisors, drain_s = [rig.supervise(), rig.supervise()], []
    with rig.load(rate_s=6) as load:
        for _ in range(ROUNDS):
            for supervisor in supervisors:
                time.sleep(1.0)
                began = time.monotonic()
                assert supervisor.stop() == 0
                drain_s.append(time.monotonic() - began)
                before = len(rig.ready())
                supervisor.start()
                ready_workers(rig.broker, before + rig.settings.workers_per_device)
    report = rig.close_books(load)
    note("SIGTERM of every supervisor in turn", len(drain_s), report, drain_s)
    assert set(report.outcomes) <= {"succeeded", "released"}, report
    assert report.succeeded == report.accepted
    assert max(drain_s) <= rig.settings.drain_s
    assert report.balanced, report


@pytest.mark.alone
def test_a_killed_run_goes_on_within_two_seconds(rig: Rig) -> None:
    rig.supervise()
    cards = {card.name: card for card in rig.ready()}
    (task_id,) = submit_many(rig.broker, 1)
    os.kill(cards[await_running(rig.broker, [task_id]).attempts[0].worker].pid, signal.SIGKILL)
    within(lambda: len(record(rig.broker, task_id).attempts) == 2, 2)
    (task,) = await_final(rig.broker, [task_id])
    assert [attempt.outcome for attempt in task.attempts] == ["crashed", "succeeded"]


def test_a_drain_gives_back_what_cannot_end_in_time(rig: Rig) -> None:
    supervisor = rig.supervise(simulated_image_ms=30_000.0, drain_s=0.5)
    task_ids = submit_many(rig.broker, 2, steps=50)
    eventually(lambda: all(running_on(rig, task_id) for task_id in task_ids))
    assert supervisor.stop() == 0
    for task in (record(rig.broker, task_id) for task_id in task_ids):
        assert (task.status, [a.outcome for a in task.attempts]) == (TaskStatus.QUEUED, ["released"])
    rig.supervise()
    assert {task.status for task in await_final(rig.broker, task_ids)} == {TaskStatus.SUCCEEDED}


def test_a_killed_supervisor_leaves_no_children(rig: Rig) -> None:
    supervisor: WorkerServer = rig.supervise()
    orphans = workers_of(supervisor)
    task_ids = submit_many(rig.broker, 2)
    await_running(rig.broker, task_ids)
    supervisor.kill()
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert not alive
    assert {record(rig.broker, task_id).status for task_id in task_ids} == {TaskStatus.SUCCEEDED}


def test_a_running_task_is_canceled_at_the_next_step(rig: Rig) -> None:
    rig.supervise(simulated_image_ms=20_000.0)
    (task_id,) = submit_many(rig.broker, 1, steps=100)
    await_running(rig.broker, [task_id])
    assert rig.broker.cancel(task_id, "default") == "flagged"
    (task,) = await_final(rig.broker, [task_id], within_s=10)
    assert (task.status, task.attempts[0].outcome) == (TaskStatus.CANCELED, "canceled")


def test_a_model_that_cannot_be_loaded_takes_no_task(rig: Rig, tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(f'[broken]\nsource = "{tmp_path}/nowhere"\n')
    rig.supervise(ready=False, models_file=models, models=("broken",))
    (task_id,) = submit_many(rig.broker, 1, model="broken")
    eventually(lambda: "model_load_failed" in rig.log(0), within_s=60)
    assert record(rig.broker, task_id).status is TaskStatus.QUEUED
    assert str(tmp_path / "nowhere") in rig.log(0)
