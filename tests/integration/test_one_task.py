"""One task that takes its worker down once, followed from Nginx to the end: in everybody's logs, and as one trace."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

from common.broker import Broker
from common.schemas import TaskRecord
from common.settings import Settings, child_environment
from tests.collector import Collector, Told
from tests.fleet import await_final, await_running, ready_workers, record
from tests.integration.nginx_edge import nginx
from tests.receivers import Receiver
from tests.servers import GatewayServer, RedisServer, Server, WorkerServer, eventually
from zfleet import cli

REQUEST = "seen-from-end-to-end"
PROMPT = "a secret nobody logs"
TRACE, CLIENTS = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FINISHED = ("finish", "store")
STAGES = ["encode", "denoise", "decode", "store", "finish"]


class Followed:
    """The task, and what was written and told of it once everybody had stopped."""

    def __init__(self, task: TaskRecord, logs: Sequence[Path], collector: Collector, untraced: str) -> None:
        self.task = task
        self.logs = logs
        self.spans = collector.trace(TRACE)
        self.collector = collector
        self.untraced = untraced  # the id of a task whose client asked for no trace of it to be kept


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    base = tmp_path_factory.mktemp("one task")
    logs = base / "logs"
    (base / "redis").mkdir()
    logs.mkdir()
    with RedisServer(base / "redis") as redis_server, Collector() as collector, Receiver() as receiver:
        settings = Settings(
            redis_url=redis_server.url, data_dir=base / "data", models=("simulated",), devices="cpu",
            workers_per_device=2, simulated_image_ms=800.0, log_dir=logs, webhook_allow=(receiver.netloc,),
        )  # fmt: skip
        servers = (
            GatewayServer(settings, base / "gateway.out"),
            WorkerServer(settings, base / "worker.out"),
            Server([sys.executable, "-m", "gateway.webhooks"], env=child_environment(settings), log=base / "c.out"),
        )
        for server in servers:
            assert server.env is not None
            server.env |= collector.environment
        gateway, worker, courier = servers
        broker = Broker(settings)
        with nginx(base / "edge", gateway.port) as edge, gateway, worker, courier:
            ready_workers(broker, 2)
            eventually(lambda: requests.get(f"{edge.url}/ready", timeout=5).ok, within_s=30)
            task_id = _submit(
                edge.url, receiver.url, {"X-Request-ID": REQUEST, "traceparent": f"00-{TRACE}-{CLIENTS}-01"}
            )
            begun = await_running(broker, [task_id])
            (pid,) = [card.pid for card in broker.workers() if card.name == begun.attempts[0].worker]
            os.kill(pid, signal.SIGKILL)
            untraced = _submit(edge.url, receiver.url, {"traceparent": f"00-{'a' * 32}-{CLIENTS}-00"})
            await_final(broker, [task_id, untraced])
            eventually(lambda: len(receiver.heard) == 2)
            requests.get(f"{edge.url}/api/status/{task_id}", timeout=5).raise_for_status()
        yield Followed(record(broker, task_id), (logs, edge.run), collector, untraced)
        broker.close()


def _submit(url: str, hook: str, headers: dict[str, str]) -> str:
    body = {"prompt": PROMPT, "webhook": {"url": hook}, "steps": 8}
    answer = requests.post(f"{url}/api/submit", json=body, headers=headers, timeout=10)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def story(followed: Followed, capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    there = [part for folder in followed.logs for part in ("--log-dir", str(folder))]
    assert cli.main(["logs", *there, "--json", *args]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_request_id_leads_from_nginx_to_the_last_attempt(
    followed: Followed, capsys: pytest.CaptureFixture[str]
) -> None:
    task = followed.task
    assert [attempt.outcome for attempt in task.attempts] == ["crashed", "succeeded"]
    lines = story(followed, capsys, "--request", REQUEST)
    told = [(line["role"], line["event"], line.get("attempt"), line.get("outcome")) for line in lines]
    attempts = [
        ("worker", "attempt_started", 1, None),
        ("worker", "attempt_started", 2, None),
        ("worker", "attempt_ended", 2, "succeeded"),
    ]
    assert [line for line in told if line[0] == "worker"] == attempts
    others = [  # who writes after a transition may find the next one written already
        ("nginx", "request", None, None),
        ("gateway", "request", None, None),
        ("supervisor", "task_reaped", 1, "requeued"),
        ("webhooks", "webhook_tried", None, "delivered"),
    ]
    assert sorted(told, key=str) == sorted([*others, *attempts], key=str)
    assert told.index(attempts[0]) < told.index(others[2]), "it is told in the order of time"
    assert {line["task_id"] for line in lines if line["role"] != "nginx"} == {task.task_id}
    one, other = (attempt.worker for attempt in task.attempts)
    assert {(line["attempt"], line["worker"]) for line in lines if "attempt" in line} == {(1, one), (2, other)}
    (ended,) = (line for line in lines if line["event"] == "attempt_ended")
    assert (ended["model"], ended["gpu"], ended["images"]) == ("simulated", "cpu", 1)
    assert 700 < ended["denoise_ms"] < ended["duration_ms"] < 30_000
    assert {"load_ms", "encode_ms", "decode_ms", "store_ms", "duration_ms"} < ended.keys()


def test_by_the_task_the_same_is_found_and_who_asked_for_it_later(
    followed: Followed, capsys: pytest.CaptureFixture[str]
) -> None:
    by_request = story(followed, capsys, "--request", REQUEST)
    by_task = story(followed, capsys, "--task", followed.task.task_id)
    others = [line for line in by_task if line not in by_request]
    assert [line for line in by_request if line not in by_task] == []
    assert sorted((line["role"], line["method"]) for line in others) == [("gateway", "GET"), ("nginx", "GET")]


def test_no_log_tells_a_prompt(followed: Followed) -> None:
    text = "".join(path.read_text() for folder in followed.logs for path in folder.glob("*-[0-9].log"))
    assert PROMPT not in text
    assert all(json.loads(line)["time"] for line in text.splitlines())


def test_all_of_it_is_one_trace_with_the_right_parents(followed: Followed) -> None:
    spans = followed.spans
    (server,) = [span for span in spans if span.kind == "SERVER"]
    assert (server.name, server.parent_id) == ("POST /api/submit", CLIENTS)
    children = [span for span in spans if span.parent_id == server.span_id]
    assert [span.name for span in children] == ["queued", "attempt", "queued", "attempt"]
    first, second = children[1], children[3]
    assert [span for span in spans if span.parent_id == first.span_id] == [], "it died with its worker"
    stages = [span for span in spans if span.parent_id == second.span_id]
    assert [span.name for span in stages] == STAGES
    (denoise,) = [span for span in stages if span.name == "denoise"]
    steps = [span for span in spans if span.parent_id == denoise.span_id]
    assert [(span.name, span.attributes["zfleet.step"]) for span in steps] == [("step", k) for k in range(1, 9)]
    assert len(spans) == 1 + len(children) + len(stages) + len(steps)
    assert all(
        earlier.ended_ns <= later.ended_ns and earlier.began_ns <= earlier.ended_ns for earlier, later in _pairs(stages)
    )
    assert all(second.began_ns <= span.began_ns and span.ended_ns <= second.ended_ns for span in stages)
    assert 700 < (denoise.ended_ns - denoise.began_ns) / 1e6 < 30_000


def test_the_spans_say_whose_they_are_and_what_went_wrong(followed: Followed) -> None:
    task = followed.task
    by_name = [(span.name, span.resource["service.name"]) for span in followed.spans]
    assert set(by_name) == {
        ("POST /api/submit", "zfleet-gateway"), ("attempt", "zfleet-supervisor"), ("queued", "zfleet-supervisor"),
        *((name, "zfleet-worker") for name in ("queued", "attempt", *STAGES, "step")),
    }  # fmt: skip
    server = followed.spans[0]
    assert server.attributes == {
        "http.request.method": "POST", "http.route": "/api/submit", "http.response.status_code": 202,
        "zfleet.request_id": REQUEST, "zfleet.task_id": task.task_id,
    }  # fmt: skip
    first, second = (span for span in followed.spans if span.name == "attempt")
    assert (first.failed, first.attributes["error.type"], second.failed) == (True, "crashed", False)
    for span, attempt, outcome in zip((first, second), task.attempts, ("crashed", "succeeded"), strict=True):
        told = {name.removeprefix("zfleet."): value for name, value in span.attributes.items()}
        assert (told["task_id"], told["request_id"], told["worker"]) == (task.task_id, REQUEST, attempt.worker)
        assert (told["outcome"], told["model"], span.kind) == (outcome, "simulated", "CONSUMER")
        assert span.began_ns / 1e9 == pytest.approx(attempt.started_at.timestamp(), abs=1)
    assert second.attributes["zfleet.steps"] == 8
    assert second.resource["service.instance.id"] == task.attempts[1].worker
    assert PROMPT not in repr(followed.collector.spans)


def test_a_client_that_wants_none_kept_gets_none(followed: Followed) -> None:
    assert {span.trace_id for span in followed.collector.spans} == {TRACE}
    assert all(span.attributes.get("zfleet.task_id") != followed.untraced for span in followed.collector.spans)


def _pairs(spans: Sequence[Told]) -> Iterator[tuple[Told, Told]]:
    yield from itertools.pairwise(spans)


def test_a_collector_that_never_answers_holds_up_no_submit_and_no_stop(settings: Settings, tmp_path: Path) -> None:
    gateway = GatewayServer(settings, tmp_path / "gateway.log")
    assert gateway.env is not None
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        gateway.env |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}", "OTEL_BSP_SCHEDULE_DELAY": "10",
        }  # fmt: skip
        with gateway:
            _submit_some(gateway)


def _submit_some(gateway: GatewayServer) -> None:
    eventually(lambda: _answers(gateway.url), within_s=30)
    began = time.monotonic()
    for _ in range(30):
        answer = requests.post(f"{gateway.url}/api/submit", json={"prompt": "x", "model": "simulated"}, timeout=5)
        assert answer.status_code == 202
    assert time.monotonic() - began < 15, "one that waited would take ten seconds for each"
    began = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - began < 15


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=1).status_code in (200, 503)
    except requests.RequestException:
        return False
