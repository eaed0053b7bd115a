"""Whether there are traces, what that costs where there are none, and what a collector that is away does to nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import spans as module
from common import tracing
from common.errors import ConfigurationError
from common.settings import traces_wanted
from common.spans import SERVER, Spans
from tests.collector import Collector

ROOT = Path(__file__).parents[3]
CLIENTS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNTRACED = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@contextmanager
def deaf() -> Iterator[str]:
    """A collector that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ({"OTEL_SDK_DISABLED": "True", "OTEL_TRACES_EXPORTER": "otlp"}, False),
        ({"OTEL_SERVICE_NAME": "mine", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
    ids=str,
)
def test_traces_are_made_where_a_collector_is_named(
    variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces_wanted() is wanted


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: must be otlp or none, not 'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "http/protobuf"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_told(variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=says):
        tracing.configure("test")


def fresh(program: str, **variables: str) -> str:
    """Run a program in a fresh process; return its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=UNTRACED | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_nothing_of_it_is_loaded_where_nothing_is_traced() -> None:
    # redis-py itself imports the metrics of OpenTelemetry wherever they are installed
    program = """
import sys, redis.observability.providers
before = {name for name in sys.modules if name.startswith("opentelemetry")}
import gateway.app, worker.gpu_worker, worker.supervisor
from common import tracing
tracing.configure("test")
assert tracing.spans() is None and tracing.carried() == ""
print(sorted({name for name in sys.modules if name.startswith(("opentelemetry", "google.protobuf"))} - before))
"""
    assert fresh(program) == "[]"


def test_without_the_packages_a_process_says_what_to_install_if_it_is_to_trace() -> None:
    program = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from common import broker, tracing
from common.errors import ConfigurationError
try:
    tracing.configure("test")
except ConfigurationError as error:
    print(error.message)
"""
    assert "pip install 'zfleet[tracing]'" in fresh(program, OTEL_TRACES_EXPORTER="otlp")


def test_a_span_goes_on_where_another_left_off_and_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "what the operator calls it")
    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        one = Spans("gateway", "g1")
        server = one.start("POST", CLIENTS, kind=SERVER)
        carried = server.carry()
        server.end(name="POST /x", attributes={"http.response.status_code": 202})
        one.start("attempt", carried, at_ns=5_000_000_000).end(at_ns=7_000_000_000, error="out_of_memory")
        one.start("stray", "no traceparent at all").end()
        assert collector.spans == []
        one.close()
        sent, attempt, stray = collector.spans
    assert (sent.name, sent.trace_id, sent.parent_id) == ("POST /x", CLIENTS[3:35], CLIENTS[36:52])
    assert (attempt.trace_id, attempt.parent_id) == (sent.trace_id, sent.span_id)
    assert (attempt.began_ns, attempt.ended_ns, attempt.failed) == (5_000_000_000, 7_000_000_000, True)
    assert attempt.attributes == {"error.type": "out_of_memory"}
    assert stray.trace_id != sent.trace_id and stray.parent_id == ""
    assert (sent.resource["service.name"], sent.resource["service.instance.id"]) == ("what the operator calls it", "g1")


def test_what_the_sampler_leaves_out_is_not_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    one = Spans("gateway")
    assert one.start("POST").carry() == ""
    assert one.start("POST", CLIENTS).carry().startswith(CLIENTS[:36]), "whoever was sampled already stays so"
    monkeypatch.setattr(module, "CLOSE_S", 0.0)
    one.close()


def test_a_collector_that_never_answers_holds_up_nobody_and_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with deaf() as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        one = Spans("test")
        began = time.monotonic()
        for _ in range(5_000):
            one.start("span", CLIENTS).end()
        assert time.monotonic() - began < 5
        (processor,) = one._provider._active_span_processor._span_processors
        assert len(processor._batch_processor._queue) <= 2048  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "CLOSE_S", 0.3)
        began = time.monotonic()
        one.close()
        assert time.monotonic() - began < 3


def test_gevent_goes_on_while_a_collector_does_not_answer() -> None:
    program = """
from gevent import monkey; monkey.patch_all()
import gevent, os, time
from common import spans
spans.CLOSE_S = 0.3
one = spans.Spans("gateway")
ticks = []
def tick():
    while True:
        ticks.append(time.monotonic())
        gevent.sleep(0.01)
gevent.spawn(tick)
for _ in range(1000):
    one.start("span").end()
gevent.sleep(0.5)
one.close()
assert len(ticks) > 10, ticks
print(max(later - sooner for sooner, later in zip(ticks[5:], ticks[6:])))
"""
    with deaf() as url:
        longest_s = float(fresh(program, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_BSP_SCHEDULE_DELAY="10"))
    assert longest_s < 0.4
