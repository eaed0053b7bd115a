"""Steering real workers through a real gateway: pausing, draining one, and starting one anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from common.broker import Broker
from common.cards import slot_of
from common.schemas import TaskStatus
from common.settings import Settings
from tests.fleet import await_final, ready_workers, record, submit_many
from tests.integration.test_rq_tools import rq
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually
from zfleet.cli import main
from zfleet.operator import Operator

PAUSED_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operated")


@pytest.fixture(scope="module")
def settings(folder: Path) -> Iterator[Settings]:
    """Of a fleet with a Redis of its own, whose workers make a picture in 0.3 s."""
    with RedisServer(folder) as redis:
        yield Settings(
            redis_url=redis.url, data_dir=folder / "data", models=("simulated",), devices="cpu", workers_per_device=2,
            simulated_image_ms=300.0, beat_s=0.5,
        )  # fmt: skip


@pytest.fixture(scope="module")
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(settings)
    yield broker
    broker.close()


@pytest.fixture(scope="module")
def gateway(broker: Broker, settings: Settings, folder: Path) -> Iterator[str]:
    """A gateway with two workers; its URL."""
    with WorkerServer(settings, folder / "worker.log"), GatewayServer(settings, folder / "gateway.log") as server:
        ready_workers(broker, 2)
        eventually(lambda: _answers(server.url), within_s=30)
        yield server.url


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def fleet(url: str) -> dict[str, Any]:
    return dict(requests.get(f"{url}/api/fleet", timeout=5).json())


def statuses(broker: Broker, ids: list[str]) -> list[TaskStatus]:
    return [record(broker, task_id).status for task_id in ids]


def test_pausing_stops_claims_within_two_seconds(gateway: str, broker: Broker, settings: Settings) -> None:
    with Operator(gateway) as operator:
        ids = submit_many(broker, 100)
        eventually(lambda: TaskStatus.SUCCEEDED in statuses(broker, ids))
        assert operator.pause().suspended
        paused = time.monotonic()
        eventually(lambda: TaskStatus.RUNNING not in statuses(broker, ids), within_s=PAUSED_WITHIN_S)
        stopped_s = time.monotonic() - paused
        left = statuses(broker, ids).count(TaskStatus.QUEUED)
        time.sleep(1.0)
        assert statuses(broker, ids).count(TaskStatus.QUEUED) == left > 0
        assert fleet(gateway)["suspended"] and stopped_s < PAUSED_WITHIN_S
        rq("resume", url=settings.redis_url)
        assert not fleet(gateway)["suspended"]
        rq("suspend", url=settings.redis_url)
        assert fleet(gateway)["suspended"]
        assert not operator.resume().suspended
        eventually(lambda: statuses(broker, ids).count(TaskStatus.QUEUED) < left)
        for task_id in ids:
            broker.cancel(task_id, None)


def test_a_drained_worker_claims_nothing_while_the_other_goes_on(gateway: str, broker: Broker) -> None:
    with Operator(gateway) as operator:
        drained, other = (worker["name"] for worker in fleet(gateway)["workers"])
        began = submit_many(broker, 4)
        eventually(lambda: any(one.attempts and one.attempts[0].worker == drained for one in _records(broker, began)))
        assert operator.drain(drained).drained
        await_final(broker, began)
        assert {one.attempts[-1].outcome for one in _records(broker, began)} == {"succeeded"}
        later = submit_many(broker, 6)
        seen = await_final(broker, later)
        assert {attempt.worker for one in seen for attempt in one.attempts} == {other}
        workers = {worker["name"]: worker for worker in fleet(gateway)["workers"]}
        assert workers[drained]["drained"] and workers[drained]["models_loaded"] == ["simulated"]
        assert not workers[other]["drained"]
        operator.restart(drained)
        eventually(lambda: drained not in [worker["name"] for worker in fleet(gateway)["workers"]], within_s=20)
        ready_workers(broker, 2)
        (heir,) = [worker for worker in fleet(gateway)["workers"] if worker["name"] != other]
        assert heir["drained"] and slot_of(heir["name"]) == slot_of(drained), "it holds for the slot"
        assert not operator.resume_worker(slot_of(drained)).drained
        eventually(lambda: _works(broker, heir["name"]), within_s=20)


def test_a_restart_gives_a_new_incarnation_and_loses_nothing(gateway: str, broker: Broker, folder: Path) -> None:
    with Operator(gateway) as operator:
        before = {worker["name"] for worker in fleet(gateway)["workers"]}
        ids = submit_many(broker, 12)
        one = eventually_running(broker, ids)
        operator.restart(one)
        seen = await_final(broker, ids)
        assert {task.status for task in seen} == {TaskStatus.SUCCEEDED}
        outcomes = {attempt.outcome for task in seen for attempt in task.attempts}
        assert outcomes <= {"succeeded", "released"}, "no crash is counted"
        eventually(lambda: one not in [card.name for card in broker.workers()], within_s=20)
        (heir,) = {card.name for card in ready_workers(broker, 2)} - before
        assert slot_of(heir) == slot_of(one)
        eventually(lambda: _works(broker, heir), within_s=20)
    log = (folder / "worker.log").read_text()
    assert "worker_died" not in log and "worker_recycled" in log


def eventually_running(broker: Broker, ids: list[str]) -> str:
    """The worker of a task that runs."""
    eventually(lambda: TaskStatus.RUNNING in statuses(broker, ids))
    return next(one.attempts[-1].worker for one in _records(broker, ids) if one.attempts)


def _records(broker: Broker, ids: list[str]) -> list[Any]:
    return [record(broker, task_id) for task_id in ids]


def _works(broker: Broker, name: str) -> bool:
    (task,) = await_final(broker, submit_many(broker, 1))
    return any(attempt.worker == name for attempt in task.attempts)


def test_the_command_line_does_the_same(gateway: str, broker: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    def ran(*line: str) -> str:
        assert main([*line, "--url", gateway]) == 0
        return capsys.readouterr().out

    (name, *_) = [card.name for card in ready_workers(broker, 2)]
    assert "zfleet resume" in ran("pause") and broker.suspended()
    assert ran("resume") == "resumed\n" and not broker.suspended()
    assert ran("drain", name) == f"{name} claims nothing more, and finishes 0 tasks\n"
    assert [card.drained for card in broker.workers() if card.name == name] == [True]
    assert ran("drain", slot_of(name), "--undo") == f"{name} claims again\n"
    assert not any(card.drained for card in broker.workers())
    assert "another takes its place" in ran("restart", name)
    eventually(lambda: name not in [card.name for card in broker.workers()], within_s=20)
    assert main(["drain", name, "--url", gateway]) == 1
    assert "no live worker has this name" in capsys.readouterr().err
