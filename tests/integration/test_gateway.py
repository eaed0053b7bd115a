"""The gateway as it runs: gunicorn with gevent over a real Redis, and workers that are the broker's own calls."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from common.broker import Broker
from common.settings import Settings, load_settings
from common.storage import open_storage
from tests.servers import GatewayServer, RedisServer, eventually
from tests.unit.gateway.fake_worker import PICTURE, FakeWorker

CHUNKED = b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Gateway(GatewayServer):
    """A gateway that answers once it is entered."""

    def __enter__(self) -> Gateway:
        super().__enter__()
        eventually(self._answers, within_s=30)
        return self

    def worker_process(self) -> psutil.Process:
        """The one process that answers; its parent only watches over it."""
        (child,) = psutil.Process(self.pid).children()
        return child

    def submit(self, **fields: object) -> str:
        answer = requests.post(f"{self.url}/api/submit", json={"prompt": "a red circle"} | fields, timeout=10)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def status(self, task_id: str, wait: float = 0) -> requests.Response:
        return requests.get(f"{self.url}/api/status/{task_id}", params={"wait": str(wait)}, timeout=wait + 10)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/api/templates", timeout=1).ok
        except requests.RequestException:
            return False


@pytest.fixture
def gateway(settings: Settings, tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(settings, tmp_path / "gateway.log") as gateway:
        yield gateway


@pytest.fixture
def worker(broker: Broker, settings: Settings) -> FakeWorker:
    return FakeWorker(broker, open_storage(settings))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that this test may kill."""
    with RedisServer(tmp_path) as server:
        yield server


def later(delay_s: float, call: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(delay_s, call)
    timer.start()
    return timer


def test_a_prompt_travels_to_its_picture(gateway: Gateway, worker: FakeWorker) -> None:
    task_id = gateway.submit()
    timer = later(0.3, worker.work)
    began = time.monotonic()
    seen = gateway.status(task_id, wait=20).json()
    assert seen["status"] == "succeeded"
    assert time.monotonic() - began < 10
    answer = requests.get(gateway.url + seen["images"][0]["url"], timeout=10)
    assert (answer.content, answer.headers["Content-Type"]) == (PICTURE, "image/webp")
    head = requests.head(gateway.url + seen["images"][0]["url"], timeout=10)
    assert int(head.headers["Content-Length"]) == len(PICTURE)
    timer.join()


def test_each_request_has_a_line_in_the_log(gateway: Gateway) -> None:
    task_id = gateway.submit(prompt="a secret")
    assert gateway.log is not None
    text = gateway.log.read_text("utf-8")
    assert "secret" not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("task_id") == task_id]
    assert (line["method"], line["route"], line["status"], line["role"]) == ("POST", "/api/submit", 202, "gateway")


def test_a_stream_shows_each_step_as_it_happens(gateway: Gateway, worker: FakeWorker) -> None:
    task_id = gateway.submit(steps=4)
    seen: list[tuple[str, float]] = []

    def work() -> None:
        (task,) = worker.take()
        for step in (1, 2, 3):
            time.sleep(0.2)
            worker.step(task, step)
        time.sleep(0.2)
        worker.succeed(task)

    timer = later(0.5, work)
    with requests.get(f"{gateway.url}/api/tasks/{task_id}/events", stream=True, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b"event: "):
                seen.append((line[7:].decode(), time.monotonic()))
    timer.join()
    names = [name for name, _ in seen]
    assert names == ["status", "status", "progress", "progress", "progress", "succeeded"]
    assert seen[-1][1] - seen[2][1] > 0.4


def test_a_follower_who_goes_is_forgotten(gateway: Gateway) -> None:
    task_id = gateway.submit()
    for _ in range(20):
        answer = requests.get(f"{gateway.url}/api/tasks/{task_id}/events", stream=True, timeout=5)
        next(answer.iter_lines())
        answer.close()
    requests.post(f"{gateway.url}/api/cancel/{task_id}", timeout=5)
    eventually(lambda: len(clients_of(gateway)) <= 1)


def clients_of(gateway: Gateway) -> list[object]:
    """The connections to a gateway that are open now."""
    connections = gateway.worker_process().net_connections()
    return [one for one in connections if one.laddr.port == gateway.port and one.status != psutil.CONN_LISTEN]


@pytest.mark.alone
@pytest.mark.parametrize("count", [1200])
def test_a_thousand_waiters_are_let_go_together(
    gateway: Gateway, broker: Broker, worker: FakeWorker, count: int
) -> None:
    ids = [gateway.submit() for _ in range(4)]
    process = gateway.worker_process()
    waiting = [open_wait(gateway, ids[number % len(ids)]) for number in range(200)]
    eventually(lambda: len(clients_of(gateway)) >= 200, within_s=20)
    time.sleep(0.5)
    threads = process.num_threads()  # gevent's few, which look up addresses for the connections to Redis
    waiting += [open_wait(gateway, ids[number % len(ids)]) for number in range(count - 200)]
    eventually(lambda: process.num_fds() > count, within_s=20)
    time.sleep(0.5)
    assert process.num_threads() == threads
    began = time.monotonic()
    for task in worker.take(len(ids)):
        worker.succeed(task)
    for sock in waiting:
        assert b'"status":"succeeded"' in read_answer(sock)
        sock.close()
    assert time.monotonic() - began < 4, "goal: a second or two on an idle machine"
    assert process.num_threads() == threads


def open_wait(gateway: Gateway, task_id: str) -> socket.socket:
    """Send a status request that waits, on a connection of its own, and do not read the answer yet."""
    sock = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    sock.sendall(f"GET /api/status/{task_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return sock


def read_answer(sock: socket.socket) -> bytes:
    """Return one whole answer from a connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += sock.recv(65_536)
    return head + b"\r\n\r\n" + body


def test_a_connection_is_kept_for_the_next_request(gateway: Gateway) -> None:
    with requests.Session() as session:
        for _ in range(3):
            answer = session.get(f"{gateway.url}/api/templates", timeout=5)
            assert answer.headers["Connection"] == "keep-alive"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as sock:
        request = b"GET /api/status/x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(request)
        assert read_answer(sock).startswith(b"HTTP/1.1 404")
        sock.sendall(request)
        assert read_answer(sock).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /api/status/" + b"x" * 9_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"x" * 9_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: secret\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
        (b"secret\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header: secret\r\n\r\n", 400, "bad_request"),
        (b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Length: secret\r\n\r\n", 400, "bad_request"),
        (CHUNKED + b'5\r\n{"pro\r\nzz\r\nsecret\r\n0\r\n\r\n', 400, "malformed_body"),
        (CHUNKED + b"-5\r\nsecret", 400, "malformed_body"),
        (CHUNKED + b"5\r\nsecretsecret\r\n0\r\n\r\n", 400, "malformed_body"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_http_is_a_problem_too(gateway: Gateway, sent: bytes, status: int, code: str) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as sock:
        sock.sendall(sent)
        answer = read_answer(sock)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == code
    assert gateway.log is not None
    assert "secret" not in gateway.log.read_text("utf-8")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_and_the_connection_survives(
    settings: Settings, broker: Broker, tmp_path: Path, chunked: bool
) -> None:
    tight = settings.model_copy(update={"body_limit_bytes": 50_000})
    with Gateway(tight, tmp_path / "gateway.log") as gateway, requests.Session() as session:
        body = b'{"prompt": "' + b"x" * 60_000 + b'"}'
        answer = session.post(
            f"{gateway.url}/api/submit",
            data=(body[at : at + 10_000] for at in range(0, len(body), 10_000)) if chunked else body,
            headers={"Content-Type": "application/json"},
            timeout=10,
        )
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert "50000 bytes" in answer.json()["detail"]
        within = session.post(f"{gateway.url}/api/submit", data=iter([b'{"prompt"', b': "x"}']), timeout=10)
        assert within.status_code == 202
    assert broker.pending() == 1


def test_without_redis_it_says_so_and_recovers_by_itself(own_redis: RedisServer, tmp_path: Path) -> None:
    settings = load_settings(
        {"redis_url": own_redis.url, "data_dir": tmp_path, "models": ("simulated",), "redis_patience_s": 1.0}
    )  # so that the outage ends before whoever waits looks by himself
    with Gateway(settings, tmp_path / "gateway.log") as gateway, ThreadPoolExecutor() as pool:
        task_id = gateway.submit()
        waiting = pool.submit(gateway.status, task_id, 30)
        time.sleep(0.3)
        own_redis.client.execute_command("WAITAOF", 1, 0, 2000) if redis_is_new(own_redis) else time.sleep(1.2)
        own_redis.kill()
        for call in (
            lambda: requests.post(f"{gateway.url}/api/submit", json={"prompt": "x"}, timeout=10),
            lambda: gateway.status(task_id),
            lambda: requests.get(f"{gateway.url}/ready", timeout=10),
            lambda: requests.get(f"{gateway.url}/health", timeout=10),
        ):
            began = time.monotonic()
            answer = call()
            assert time.monotonic() - began < 5
            assert answer.status_code == 503
            assert answer.json()["status"] == "unhealthy" or int(answer.headers["Retry-After"]) > 0
        own_redis.start()
        eventually(lambda: gateway.status(task_id).status_code == 200)
        assert gateway.status(task_id).json()["status"] == "queued"
        broker = Broker(settings)
        worker = FakeWorker(broker)
        worker.work()
        assert waiting.result(20).json()["status"] == "succeeded", "whoever waited all along is told as well"
        assert gateway.submit()


def redis_is_new(server: RedisServer) -> bool:
    """Whether this Redis can be asked to have written everything down (7.2 and later)."""
    return tuple(int(part) for part in server.client.info("server")["redis_version"].split(".")[:2]) >= (7, 2)


def test_a_redis_that_hangs_is_told_in_time(own_redis: RedisServer, tmp_path: Path) -> None:
    settings = load_settings({"redis_url": own_redis.url, "data_dir": tmp_path, "models": ("simulated",)})
    with Gateway(settings, tmp_path / "gateway.log") as gateway:
        gateway.submit()
        own_redis.signal(signal.SIGSTOP)
        began = time.monotonic()
        answer = requests.post(f"{gateway.url}/api/submit", json={"prompt": "x"}, timeout=10)
        assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable")
        assert time.monotonic() - began < 6
        own_redis.signal(signal.SIGCONT)
        eventually(lambda: requests.get(f"{gateway.url}/api/queue", timeout=5).status_code == 200)


def test_a_killed_gateway_loses_no_accepted_task(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    accepted: list[str] = []
    with Gateway(settings, tmp_path / "gateway.log") as gateway:

        def client() -> None:
            while True:
                try:
                    accepted.append(gateway.submit())
                except requests.RequestException:
                    return

        clients = [threading.Thread(target=client) for _ in range(4)]
        for one in clients:
            one.start()
        eventually(lambda: len(accepted) >= 30, within_s=20)
        children = psutil.Process(gateway.pid).children()
        gateway.kill()
        for child in children:  # they would stop by themselves, a second later
            child.kill()
        for one in clients:
            one.join(20)
    known = {summary.task_id for summary in broker.tasks("default", status=None, limit=10_000, before=None)[0]}
    assert len(accepted) >= 30 and set(accepted) <= known
    assert broker.queues()[0].queued == len(known)


def test_a_worker_process_that_dies_is_replaced(gateway: Gateway) -> None:
    task_id = gateway.submit()
    gateway.worker_process().kill()
    eventually(lambda: _status_or_none(gateway, task_id) == 200)


def _status_or_none(gateway: Gateway, task_id: str) -> int | None:
    try:
        return gateway.status(task_id).status_code
    except requests.RequestException:
        return None


def test_sigterm_answers_whoever_waits_and_stops(gateway: Gateway) -> None:
    task_id = gateway.submit()
    waiting = [open_wait(gateway, task_id) for _ in range(20)]
    idle = [socket.create_connection(("127.0.0.1", gateway.port), timeout=5) for _ in range(5)]
    follower = requests.get(f"{gateway.url}/api/tasks/{task_id}/events", stream=True, timeout=20)
    lines = follower.iter_lines()
    assert next(lines).startswith(b"retry: ")
    kept = requests.Session()
    kept.get(f"{gateway.url}/api/templates", timeout=5)
    time.sleep(0.5)
    began = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - began < 12
    for sock in waiting:
        answer = read_answer(sock)
        assert answer.startswith(b"HTTP/1.1 200") and b'"status":"queued"' in answer
        assert sock.recv(1) == b""
    assert all(sock.recv(1) == b"" for sock in idle)
    assert b"event: succeeded" not in list(lines)
    assert gateway.log is not None
    text = gateway.log.read_text("utf-8")
    assert "Traceback" not in text and "graceful timeout" not in text


def test_several_processes_serve_one_port(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    with Gateway(settings.model_copy(update={"gateway_workers": 2}), tmp_path / "gateway.log") as gateway:
        eventually(lambda: len(psutil.Process(gateway.pid).children()) == 2)
        ids = [gateway.submit() for _ in range(10)]
        with ThreadPoolExecutor(10) as pool:
            answers = [pool.submit(gateway.status, task_id, 20) for task_id in ids]
            time.sleep(0.5)
            worker = FakeWorker(broker)
            for _ in ids:
                worker.work()
            assert {answer.result(10).json()["status"] for answer in answers} == {"succeeded"}
    assert not [pid for pid in psutil.pids() if _is_child_of(pid, gateway.pid)]


def _is_child_of(pid: int, parent: int) -> bool:
    try:
        return psutil.Process(pid).ppid() == parent and pid != os.getpid()
    except psutil.NoSuchProcess:
        return False
