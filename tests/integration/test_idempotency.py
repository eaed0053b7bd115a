"""One Idempotency-Key in the hands of a hundred clients at once, before two gateways."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from common.broker import Broker
from common.settings import Settings
from tests.servers import GatewayServer, eventually
from tests.unit.gateway.fake_worker import FakeWorker

AT_ONCE = 100
ROUNDS = 3


@pytest.fixture
def gateways(settings: Settings, tmp_path: Path) -> Iterator[list[str]]:
    """The addresses of two gateways, of which one has two processes."""
    two = settings.model_copy(update={"gateway_workers": 2})
    with GatewayServer(settings, tmp_path / "1.log") as one, GatewayServer(two, tmp_path / "2.log") as other:
        urls = [one.url, other.url]
        for url in urls:
            eventually(lambda: answers(url), within_s=30)  # noqa: B023 (called at once)
        yield urls


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/api/templates", timeout=1).ok
    except requests.RequestException:
        return False


def all_at_once(urls: list[str], key: str, body: Callable[[int], dict[str, Any]]) -> list[requests.Response]:
    """Send so many submits under one key in the same moment, each by a connection that stands already."""
    line = threading.Barrier(AT_ONCE)

    def send(number: int) -> requests.Response:
        url = urls[number % len(urls)]
        with requests.Session() as session:
            session.get(f"{url}/api/templates", timeout=30)
            line.wait(30)
            headers = {"Idempotency-Key": key}
            return session.post(f"{url}/api/submit", json=body(number), headers=headers, timeout=30)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(send, range(AT_ONCE)))


def test_a_hundred_submits_of_one_key_are_one_task(gateways: list[str], broker: Broker) -> None:
    for number in range(ROUNDS):
        found = all_at_once(gateways, f"same-{number}", lambda _: {"prompt": "x"})
        assert Counter(answer.status_code for answer in found) == {202: AT_ONCE}
        assert len({answer.json()["task_id"] for answer in found}) == 1
        assert broker.pending() == number + 1


def test_of_a_hundred_bodies_under_one_key_one_wins(gateways: list[str], broker: Broker) -> None:
    for number in range(ROUNDS):
        found = all_at_once(gateways, f"other-{number}", lambda k: {"prompt": f"prompt {k}"})
        assert Counter(answer.status_code for answer in found) == {202: 1, 409: AT_ONCE - 1}
        (winner,) = [answer.json()["task_id"] for answer in found if answer.status_code == 202]
        problems = [answer.json() for answer in found if answer.status_code == 409]
        assert {problem["code"] for problem in problems} == {"idempotency_conflict"}
        assert all(winner in problem["detail"] for problem in problems)
        record = broker.view(winner)
        assert record is not None
        assert found[int(record.request.prompt.split()[1])].status_code == 202
        assert broker.pending() == number + 1


def test_while_a_task_begins_and_ends_its_repeats_tell_of_it(gateways: list[str], broker: Broker) -> None:
    done = threading.Timer(0.05, FakeWorker(broker).work)
    assert requests.post(
        f"{gateways[0]}/api/submit", json={"prompt": "x"}, headers={"Idempotency-Key": "k"}, timeout=30
    ).ok
    done.start()
    found = all_at_once(gateways, "k", lambda _: {"prompt": "x"})
    done.join()
    assert Counter(answer.status_code for answer in found) == {202: AT_ONCE}
    assert {answer.json()["status"] for answer in found} <= {"queued", "running", "succeeded"}
    assert len({answer.json()["task_id"] for answer in found}) == 1
