"""Figures of a fleet that works: two gunicorn processes, a worker, a courier, each a real process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from common.broker import Broker
from common.settings import Settings, child_environment, load_settings
from tests.fleet import await_final, ready_workers, submit_many
from tests.integration.hardened import answers
from tests.servers import GatewayServer, RedisServer, Server, WorkerServer, binary, eventually

SUBMITS, POLLS = 40, 60


class Fleet(NamedTuple):
    settings: Settings
    redis: RedisServer
    broker: Broker
    gateway: GatewayServer
    worker: WorkerServer


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("metrics")
    with RedisServer(folder) as server:
        settings = load_settings(
            {
                "redis_url": server.url, "data_dir": folder / "data", "models": ("simulated",), "devices": "cpu",
                "simulated_image_ms": 20.0, "gateway_workers": 2, "max_batch": 4, "beat_s": 0.2, "lease_s": 5.0,
            }
        )  # fmt: skip
        broker = Broker(settings)
        with (
            WorkerServer(settings, folder / "worker.log") as worker,
            GatewayServer(settings, folder / "gateway.log") as gateway,
        ):
            eventually(lambda: answers(gateway.url), within_s=30)
            ready_workers(broker)
            yield Fleet(settings, server, broker, gateway, worker)
        broker.close()


def scrape(url: str) -> str:
    answer = requests.get(f"{url}/metrics", timeout=10)  # a connection of its own, so that either process may answer
    assert answer.status_code == 200
    return answer.text


def figure(text: str, name: str, **labels: str) -> float:
    """The sum of all samples of this name with these labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def requested(text: str, route: str) -> float:
    return figure(text, "zfleet_http_requests_total", route=route)


def call_often(url: str) -> list[str]:
    """Submit and poll, each call over a connection of its own; return the tasks."""

    def submit(_: int) -> str:
        answer = requests.post(
            f"{url}/api/submit", json={"prompt": "x", "n": 2, "width": 256, "height": 256}, timeout=20
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def poll(_: int) -> None:
        assert requests.get(f"{url}/api/status/nothing", timeout=20).status_code == 404

    with ThreadPoolExecutor(8) as threads:
        tasks = list(threads.map(submit, range(SUBMITS)))
        list(threads.map(poll, range(POLLS)))
    return tasks


def test_every_process_tells_exactly_what_all_have_answered(fleet: Fleet) -> None:
    await_final(fleet.broker, call_often(fleet.gateway.url))
    eventually(lambda: requested(scrape(fleet.gateway.url), "/api/submit") == SUBMITS, every_s=0.2)
    told = [scrape(fleet.gateway.url) for _ in range(12)]
    assert {requested(text, "/api/submit") for text in told} == {SUBMITS}
    assert {requested(text, "/api/status/<task_id>") for text in told} == {POLLS}
    assert {figure(text, "zfleet_submit_duration_seconds_count") for text in told} == {SUBMITS}
    assert len(fleet.redis.client.keys("zf:counts:*")) >= 2, "both processes have answered some"
    assert figure(told[0], "zfleet_images_total") == 2 * SUBMITS
    assert figure(told[0], "zfleet_task_duration_seconds_count") == SUBMITS
    for stage in ("encode", "denoise", "decode", "store"):
        assert 0 < figure(told[0], "zfleet_stage_duration_seconds_sum", stage=stage) < 60


def test_steps_are_told_with_how_many_advanced_together(fleet: Fleet) -> None:
    before = figure(scrape(fleet.gateway.url), "zfleet_steps_total")
    tasks = submit_many(fleet.broker, 5, n=2, steps=8)
    await_final(fleet.broker, tasks)
    eventually(lambda: figure(scrape(fleet.gateway.url), "zfleet_steps_total") >= before + 5 * 2 * 8, every_s=0.2)
    text = scrape(fleet.gateway.url)
    steps, batches = figure(text, "zfleet_batch_size_sum"), figure(text, "zfleet_batch_size_count")
    assert steps == figure(text, "zfleet_steps_total") and batches < steps, "pictures advanced together"


def test_promtool_finds_nothing_wrong(fleet: Fleet) -> None:
    text = scrape(fleet.gateway.url)
    done = subprocess.run(
        [binary("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("counter", "gauge", "histogram") for family in families)


def test_a_host_tells_of_its_disk(fleet: Fleet) -> None:
    eventually(lambda: figure(scrape(fleet.gateway.url), "zfleet_disk_size_bytes"), every_s=0.2)
    usage = psutil.disk_usage(str(fleet.settings.data_dir.parent))
    text = scrape(fleet.gateway.url)
    assert figure(text, "zfleet_disk_size_bytes") == pytest.approx(usage.used + usage.free, rel=0.01)
    assert 0 < figure(text, "zfleet_disk_free_bytes") < figure(text, "zfleet_disk_size_bytes")
    assert figure(text, "zfleet_redis_memory_used_bytes") > 500_000


def test_a_worker_that_was_killed_is_a_crash_and_its_runs_are_reaped(fleet: Fleet) -> None:
    tasks = submit_many(fleet.broker, 30, n=8)
    eventually(lambda: any(card.running for card in fleet.broker.workers()))
    (child,) = psutil.Process(fleet.worker.pid).children()
    child.kill()
    ended = await_final(fleet.broker, tasks)
    taken_back = sum(len(task.attempts) - 1 for task in ended)
    text = scrape(fleet.gateway.url)
    assert figure(text, "zfleet_worker_crashes_total") == 1
    assert figure(text, "zfleet_tasks_reaped_total") == taken_back > 0
    ready_workers(fleet.broker)


def test_a_stop_loses_nothing_that_was_counted(fleet: Fleet) -> None:
    """And a worker that leaves as it was asked to is no crash. The last of this fleet."""
    before = fleet.broker.counts().get("requests|/api/models|GET|200", 0)
    for _ in range(25):
        assert requests.get(f"{fleet.gateway.url}/api/models", timeout=5).ok
    fleet.gateway.stop()
    assert fleet.broker.counts()["requests|/api/models|GET|200"] == before + 25
    fleet.worker.stop()
    assert fleet.broker.counts()["crashes"] == 1


def test_history_goes_on_without_a_worker(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        settings = load_settings({"redis_url": server.url, "data_dir": tmp_path, "models": ("simulated",)})
        with Server(
            [sys.executable, "-m", "gateway.webhooks"], env=child_environment(settings), log=tmp_path / "courier.log"
        ):
            eventually(lambda: server.client.llen("zf:history:15m") >= 1, within_s=20)
