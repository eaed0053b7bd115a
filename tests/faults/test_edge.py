"""The gateway and Nginx are killed in the middle of requests: every 202 is a task, and a repeated submit is the same.

Nginx here sends the pictures itself (X-Accel), as where it is deployed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG, Rig, answers, kill_all, tree, within
from tests.integration.nginx_edge import USER, nginx_binary, render
from tests.servers import Server, eventually, free_port

RATE_S = 30
KILLS = 10 if LONG else 3
BETWEEN_S = 1.5
DOWN_S = 0.3  # so that some submit is sure to meet nobody
BACK_S = 20.0


class NginxServer(Server):
    """Nginx before a gateway, from the configuration that is shipped; it can be killed and started again."""

    def __init__(self, folder: Path, gateway: int, results: Path) -> None:
        folder.mkdir()
        results.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        text = render(
            gateways=[f"127.0.0.1:{gateway}"], results_dir=results, run_dir=folder, listen=f"127.0.0.1:{port}",
            user=USER, rate="1000r/s", worker_processes="2",
        )  # fmt: skip
        (folder / "nginx.conf").write_text(text)
        super().__init__([nginx_binary(), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, x_accel="/_results/", simulated_image_ms=40.0) as rig:
        yield rig


@pytest.fixture
def edge(rig: Rig, tmp_path: Path) -> Iterator[NginxServer]:
    with NginxServer(tmp_path / "nginx", rig.gateway.port, rig.settings.results_dir) as edge:
        eventually(lambda: answers(f"{edge.url}/health"), within_s=BACK_S)
        yield edge


def killed_under_load(rig: Rig, url: str, kill: Callable[[], None], start: Callable[[], object]) -> list[float]:
    """Kill and start again while clients talk to `url`; returns the seconds until a submit is acknowledged again."""
    recovery_s = []
    with rig.load(url=url, rate_s=RATE_S, clients=6) as load:
        for _ in range(KILLS):
            time.sleep(BETWEEN_S)
            kill()
            since = time.time()
            time.sleep(DOWN_S)
            start()
            within(lambda: max(rig.ledger.accepted_at.values()) > since, BACK_S)  # noqa: B023 (called at once)
            recovery_s.append(time.time() - since)
    assert load.drain()
    return recovery_s


def resubmitted(rig: Rig, url: str) -> None:
    """Send the last submits once more, each under its key: the tasks are those that the clients were told of."""
    for task_id, key in list(rig.ledger.accepted.items())[-20:]:
        answer = requests.post(
            f"{url}/api/submit", json=rig.ledger.sent[key], headers={"Idempotency-Key": key}, timeout=5
        )
        assert (answer.status_code, answer.json()["task_id"]) == (202, task_id)


def test_killed_gateway(rig: Rig, edge: NginxServer, note: NoteFn) -> None:
    rig.supervise()
    recovery_s = killed_under_load(rig, edge.url, rig.kill_gateway, rig.start_gateway)
    resubmitted(rig, edge.url)
    report = rig.audit(edge.url)
    note("kill -9 of the gateway", KILLS, report, recovery_s)
    assert rig.ledger.unanswered, "no request met a fault"
    assert report.balanced, report


def test_killed_nginx(rig: Rig, edge: NginxServer, note: NoteFn) -> None:
    rig.supervise()

    def kill() -> None:
        kill_all(tree(edge))
        edge.kill()

    recovery_s = killed_under_load(rig, edge.url, kill, edge.start)
    resubmitted(rig, edge.url)
    report = rig.audit(edge.url)
    note("kill -9 of Nginx", KILLS, report, recovery_s)
    assert rig.ledger.unanswered, "no request met a fault"
    assert report.balanced, report
