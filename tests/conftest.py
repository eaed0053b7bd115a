"""Fixtures that chain: redis_server -> settings -> broker. Every server is a real one; a missing one fails the test."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common.broker import Broker
from common.cards import WorkerCard
from common.records import NewTask
from common.schemas import ResolvedRequest
from common.settings import Settings, load_settings
from tests.servers import RedisServer

SubmitFn = Callable[..., str]

# Several test processes share the cores; torch's threads would wait for each other at every small step. Workers that
# tests start read the same.
for variable in ("OMP_NUM_THREADS", "ZFLEET_CPU_THREADS"):
    os.environ.setdefault(variable, "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` has it; what tests start is to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes longest, longest first: begun last, one process would go on with it when the others have nothing left.
LONG_FILES = (
    "integration/test_stack.py", "integration/test_bench.py", "integration/test_load.py",
    "integration/test_mixed_fleet.py", "browser/test_operate_page.py", "integration/test_worker_limits.py",
    "integration/test_openapi_fuzz.py", "browser/test_at_work.py", "integration/test_acl.py", "deploy/test_hosts.py",
    "integration/test_keys.py", "integration/test_inputs.py", "integration/test_fleet.py",
    "integration/test_one_task.py", "integration/test_rq_tools.py", "integration/test_nginx.py",
    "integration/test_bench_gpu.py",
    "unit/worker/test_pico_training.py", "unit/worker/zimage/test_through_the_engine.py",
    "unit/worker/zimage/test_control.py", "unit/worker/test_pico.py", "unit/worker/test_zimage_memory.py",
    "unit/worker/zimage/test_pictures.py", "unit/worker/zimage/test_decoding.py", "unit/worker/zimage/test_omni.py",
    "unit/worker/test_stock.py", "unit/common/test_connection.py", "unit/zfleet/test_cli.py",
    "faults/test_workers.py", "faults/test_poison.py", "faults/test_redis.py", "faults/test_disk.py",
    "faults/test_sentinel.py", "faults/test_residency.py", "faults/test_lost_replies.py", "faults/test_books.py",
    "faults/test_partition.py", "faults/test_edge.py", "faults/test_idempotency.py", "faults/test_clock.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def described_once() -> Iterator[None]:
    """Have the schemas in a gateway's description made once a process: nine tenths of what an application costs.

    Each application gets a copy of its own.
    """
    from flask_openapi3 import utils

    make, made = utils.get_model_schema, dict[tuple[object, ...], bytes]()

    def remembered(*which: Any, **mode: Any) -> Any:
        key = (*which, *mode.items())
        if key not in made:
            made[key] = pickle.dumps(make(*which, **mode))
        return pickle.loads(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_model_schema", remembered)
        yield


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One real redis-server with AOF for the whole run."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(redis_session: RedisServer) -> RedisServer:
    """The shared redis-server, emptied. A test that kills its Redis starts a RedisServer of its own."""
    redis_session.flush()
    return redis_session


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a fleet that serves `simulated` from this test's own folder."""
    return load_settings(
        {
            "redis_url": redis_url,
            "data_dir": tmp_path / "data dir",
            "models": ("simulated", "pico"),
            "devices": "cpu",
            "simulated_image_ms": 40.0,
        }
    )


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(settings)
    yield broker
    broker.close()


def resolved(**changes: object) -> ResolvedRequest:
    """A request for the simulated model, with changes."""
    fields: dict[str, object] = {
        "prompt": "a red circle",
        "model": "simulated",
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 0.0,
        "seed": 1,
        "n": 1,
        "format": "png",
        "quality": 85,
        "priority": "normal",
    }
    return ResolvedRequest.model_validate(fields | changes)


@pytest.fixture
def submit(broker: Broker) -> SubmitFn:
    """Submit a task straight to the broker; returns its id. Keywords change the request; `tenant` the tenant."""

    def submit_one(*, tenant: str = "default", **changes: object) -> str:
        task = NewTask(task_id=secrets.token_hex(16), tenant=tenant, request=resolved(**changes))
        return broker.submit(task).task_id

    return submit_one


@pytest.fixture
def card() -> Callable[[str], WorkerCard]:
    """A worker's card by its name."""

    def make(name: str) -> WorkerCard:
        now = datetime.now(UTC)
        return WorkerCard(
            name=name, host="host", pid=1, state="idle", device="cpu", models=["simulated"], models_loaded=[],
            capacity=1, running=[], images_done=0, rss_mb=1, started_at=now, seen_at=now,
        )  # fmt: skip

    return make
