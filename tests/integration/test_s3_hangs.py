"""A bucket that hangs: its real server is frozen, so that it takes connections and says nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from tests.fleet import await_final, ready_workers, record
from tests.s3server import BUCKET, S3Server, show_credentials
from tests.samples import encoded
from tests.servers import GatewayServer, WorkerServer, eventually

TIMEOUT_S = 2.0  # of S3, half of it for each try
BOUND_S = 30.0  # for what takes TIMEOUT_S and a little, on a busy machine


@pytest.fixture
def bucket(settings: Settings, tmp_path: Path) -> Iterator[tuple[S3Server, Settings]]:
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path) as server:
        show_credentials(patch)
        changes: dict[str, Any] = {"storage": "s3", "s3_url": f"s3://{BUCKET}/results", "s3_endpoint": server.endpoint}
        changes |= {"s3_timeout_s": TIMEOUT_S, "models": ("simulated",), "drain_s": 0.5, "simulated_image_ms": 100.0}
        try:
            yield server, settings.model_copy(update=changes)
        finally:
            server.signal(signal.SIGCONT)


def submitted(url: str) -> str:
    answer = requests.post(f"{url}/api/submit", json={"prompt": "a red circle", "steps": 2}, timeout=BOUND_S)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def test_a_bucket_that_hangs_is_told_of_soon_holds_up_nobody_and_costs_nothing(
    bucket: tuple[S3Server, Settings], broker: Broker, tmp_path: Path
) -> None:
    server, settings = bucket
    gateway, first = GatewayServer(settings, tmp_path / "gateway.log"), WorkerServer(settings, tmp_path / "first.log")
    with gateway:
        first.start()
        ready_workers(broker)
        url = gateway.url
        eventually(lambda: _is_up(url), within_s=30)
        done = submitted(url)
        await_final(broker, [done])
        picture = f"{url}{requests.get(f'{url}/api/status/{done}', timeout=BOUND_S).json()['images'][0]['url']}"

        server.signal(signal.SIGSTOP)
        answers: dict[str, tuple[int, str, str]] = {}
        asked = {
            "thumbnail": lambda: requests.get(f"{url}/api/tasks/{done}/thumbnail", timeout=BOUND_S),
            "picture": lambda: requests.get(f"{picture}?via=gateway", timeout=BOUND_S),
            "upload": lambda: requests.post(
                f"{url}/api/images", data=encoded(), headers={"Content-Type": "image/png"}, timeout=BOUND_S
            ),
        }

        def ask(name: str) -> None:
            answer = asked[name]()
            answers[name] = answer.status_code, answer.json()["code"], answer.headers["Retry-After"]

        threads = [threading.Thread(target=ask, args=(name,)) for name in asked for _ in range(4)]
        accepted = [submitted(url) for _ in range(3)]
        for thread in threads:
            thread.start()
        accepted.append(submitted(url))
        assert requests.get(f"{url}/api/status/{done}", timeout=BOUND_S).status_code == 200
        for thread in threads:
            thread.join()
        assert answers == dict.fromkeys(asked, (503, "storage_error", "5"))

        eventually(lambda: "store_failed" in (tmp_path / "first.log").read_text(), within_s=20)
        first.signal(signal.SIGTERM)
        eventually(lambda: "pictures" in " ".join(_health(url)["reasons"]), within_s=30)
        assert _health(url)["status"] == "degraded"
        first.stop(timeout_s=settings.drain_s + 30)  # it has 10 s beyond the drain
        assert {record(broker, task_id).status for task_id in accepted} == {TaskStatus.QUEUED}

        server.signal(signal.SIGCONT)
        with WorkerServer(settings, tmp_path / "second.log"):
            tasks = await_final(broker, accepted)
        assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
        assert {a.outcome for task in tasks for a in task.attempts} <= {"released", "succeeded"}
        eventually(lambda: "pictures" not in " ".join(_health(url)["reasons"]), within_s=30)
        assert requests.get(f"{url}/api/tasks/{done}/thumbnail", timeout=BOUND_S).status_code == 200


def _health(url: str) -> dict[str, Any]:
    return dict(requests.get(f"{url}/health", timeout=BOUND_S).json())


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/live", timeout=BOUND_S).ok
    except requests.RequestException:
        return False
