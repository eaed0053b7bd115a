"""Redis is killed, frozen and cut short under load: nothing acknowledged is lost, nothing finished is done again.

A run that is under way in an outage longer than its lease is given back and made elsewhere: `released`, no harm done.
What is stored by then is kept in hand, and becomes the result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG, NORMAL_AGAIN_S, Rig, frozen, within, workers_of
from tests.fleet import await_running, ready_workers, record, submit_many
from tests.servers import WorkerServer

WORKERS = 2
RATE_S = 8
OUTAGES_S = (0.2, 5.0, 30.0) if LONG else (0.2, 5.0)
FREEZE_S = 30.0 if LONG else 5.0
REFUSED_WITHIN_S = 3.0
TAIL_BYTES = 7  # enough to tear the last transition, and no more than that one
CALLS = (("POST", "/api/submit"), ("GET", "/api/status/{task}"), ("GET", "/api/queue"), ("GET", "/health"))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, workers_per_device=WORKERS) as rig:
        yield rig


def pids(supervisor: WorkerServer) -> set[int]:
    return {child.pid for child in workers_of(supervisor)}


def normal(rig: Rig, since: float) -> bool:
    """Whether a task that was accepted after `since` has gone all the way, and every worker is at work."""
    ended = any(rig.ledger.accepted_at[task_id] > since for task_id in list(rig.ledger.finals))
    return ended and len(rig.ready()) == WORKERS


def stored(rig: Rig) -> set[str]:
    """Return the keys of all pictures that are whole on the disk."""
    results = rig.settings.results_dir
    return {str(path.relative_to(results)) for path in results.rglob("*.png")}


def results(rig: Rig) -> set[str]:
    """Return the keys of all pictures that clients can see."""
    records = [record(rig.broker, task_id) for task_id in rig.ledger.accepted]
    return {image.key for task in records for image in task.images}


def refusal(rig: Rig, method: str, path: str) -> tuple[requests.Response, float]:
    """Return what the gateway answers while Redis hangs, and after how many seconds."""
    body = None
    if method == "POST":  # refused or not, it may be carried out when Redis thaws, and then it is in the books
        body = {"prompt": "x", "metadata": {"key": "refused"}}
        rig.ledger.write("sent", key="refused", body=body)
    began = time.monotonic()
    answer = requests.request(method, rig.url + path, json=body, timeout=20)
    return answer, time.monotonic() - began


@pytest.mark.timeout(300)
def test_killed_redis(rig: Rig, note: NoteFn) -> None:
    supervisor = rig.supervise()
    before, recovery_s = pids(supervisor), []
    finished: set[str] = set()
    with rig.load(rate_s=RATE_S) as load:
        for outage_s in OUTAGES_S:
            time.sleep(3)
            rig.redis.kill()
            time.sleep(outage_s)
            finished |= stored(rig)
            rig.redis.start()
            since = time.time()
            recovery_s.append(within(lambda: normal(rig, since), NORMAL_AGAIN_S))  # noqa: B023 (called at once)
    report = rig.close_books(load)
    note(f"kill -9 of Redis, down {', '.join(f'{s:g}' for s in OUTAGES_S)} s", len(OUTAGES_S), report, recovery_s)
    assert pids(supervisor) == before, "a worker left because Redis was away"
    assert finished <= results(rig), "a finished picture was made again"
    assert report.accepted == report.succeeded and set(report.outcomes) <= {"succeeded", "released"}, report
    assert report.balanced, report


@pytest.mark.timeout(300)
def test_frozen_redis(rig: Rig, note: NoteFn) -> None:
    supervisor = rig.supervise()
    before = pids(supervisor)
    with rig.load(rate_s=RATE_S) as load:
        time.sleep(3)
        task_id = next(iter(rig.ledger.accepted))
        with frozen(rig.redis.pid), ThreadPoolExecutor(len(CALLS)) as callers:
            thaw = time.monotonic() + FREEZE_S
            calls = [callers.submit(refusal, rig, method, path.format(task=task_id)) for method, path in CALLS]
            refusals = [call.result() for call in calls]
            time.sleep(max(0.0, thaw - time.monotonic()))
            finished = stored(rig)
        since = time.time()
        recovery_s = within(lambda: normal(rig, since), NORMAL_AGAIN_S)
    report = rig.close_books(load)
    note(f"SIGSTOP of Redis for {FREEZE_S:g} s", 1, report, [recovery_s])
    for (_, path), (answer, seconds) in zip(CALLS, refusals, strict=True):
        assert answer.status_code == 503, f"{path}: {answer.text}"
        assert seconds <= REFUSED_WITHIN_S, f"{path} took {seconds:.1f} s"
    assert pids(supervisor) == before, "a worker left because Redis was away"
    assert report.accepted == report.succeeded, report
    silent = [
        path for (_, path), (answer, _) in zip(CALLS, refusals, strict=True) if "Retry-After" not in answer.headers
    ]
    assert not silent
    assert finished <= results(rig), "a finished picture was made again"
    assert set(report.outcomes) <= {"succeeded", "released"}, report
    assert report.balanced, report


def test_redis_loses_the_last_thing_it_acknowledged(rig: Rig, note: NoteFn) -> None:
    """Nobody writes after the last submit, so that this is what the torn end of the file held."""
    supervisor = rig.supervise()
    with rig.load(rate_s=RATE_S, backlog=100) as load, contextlib.ExitStack() as still:
        time.sleep(2)
        for process in [*workers_of(supervisor), psutil.Process(supervisor.pid)]:
            still.enter_context(frozen(process.pid))
        time.sleep(1)
        load.stop()
        time.sleep(0.5)  # every submit under way is acknowledged
        rig.redis.kill()
        rig.redis.forget(rig.redis.written() - TAIL_BYTES)
        rig.redis.start()
    report = rig.close_books(load)
    note(f"kill -9 of Redis, its last {TAIL_BYTES} bytes lost", 1, report)
    assert "truncat" in (rig.folder / "redis" / "redis.log").read_text(), "nothing was torn"
    assert report.balanced, report


def test_an_outage_longer_than_the_lease_doubles_nothing(rig: Rig) -> None:
    rig.supervise(simulated_image_ms=4_000.0)
    task_ids = submit_many(rig.broker, 2, steps=60)
    within(lambda: all(record(rig.broker, task_id).status == "running" for task_id in task_ids), 20)
    rig.redis.kill()
    time.sleep(3.0)
    rig.redis.start()
    within(lambda: rig.broker.pending() == 0, 30)
    for task_id in task_ids:
        task = record(rig.broker, task_id)
        assert [attempt.outcome for attempt in task.attempts] == ["released", "succeeded"]


def test_a_drain_while_redis_is_away_ends(rig: Rig) -> None:
    supervisor = rig.supervise(drain_s=0.5)
    ready_workers(rig.broker, WORKERS)
    await_running(rig.broker, submit_many(rig.broker, 2))
    orphans = workers_of(supervisor)
    rig.redis.kill()
    supervisor.kill()
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert not alive, "a worker without a supervisor and without Redis holds its GPU for ever"
