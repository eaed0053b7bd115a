"""The command line against a real fleet."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from common.settings import Settings
from tests.integration.zfleet_command import ROOT, Up, environment, zfleet
from tests.servers import Server, eventually, free_port
from zfleet.client import Client, Refused, TaskFailed


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("a fleet"), "--workers", "2", simulated_image_ms=400) as up:
        yield up


@pytest.fixture
def env(up: Up) -> dict[str, str]:
    return environment(url=up.url)


def test_generate_saves_a_picture(env: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "ein Bild.png"
    done = zfleet("generate", "a red circle", "-o", str(target), "--seed", "1", "--steps", "4", env=env)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    assert Image.open(target).format == "PNG"
    assert done.stderr.splitlines()[-1] == "succeeded"
    again = tmp_path / "again.png"
    assert zfleet("generate", "a red circle", "-o", str(again), "--seed", "1", "--steps", "4", env=env).returncode == 0
    assert again.read_bytes() == target.read_bytes(), "the same seed gives the same picture"


def test_several_pictures_in_every_format(env: dict[str, str], tmp_path: Path) -> None:
    for suffix, expected in ((".jpg", "JPEG"), (".webp", "WEBP")):
        done = zfleet("generate", "x", "-n", "2", "-o", str(tmp_path / f"x{suffix}"), env=env)
        assert done.returncode == 0, done.stderr
        assert [Image.open(path).format for path in done.stdout.splitlines()] == [expected] * 2
    assert len(list(tmp_path.iterdir())) == 4


def test_submit_status_cancel(env: dict[str, str]) -> None:
    task_id = zfleet("submit", "x", env=env).stdout.strip()
    waited = zfleet("status", task_id, "--wait", "20", env=env)
    assert waited.returncode == 0
    assert "succeeded" in waited.stdout
    again = zfleet("cancel", task_id, env=env)
    assert again.returncode == 1
    assert again.stderr.startswith("zfleet: ") and again.stderr.count("\n") == 1
    ids = [zfleet("submit", "x", "-n", "8", "--priority", "low", env=env).stdout.strip() for _ in range(3)]
    done = zfleet("cancel", ids[2], env=env)
    assert done.returncode == 0, done.stderr


def test_an_unknown_task_is_one_line(env: dict[str, str]) -> None:
    for line in (["status", "nope"], ["cancel", "../../health"], ["status", "-"]):
        done = zfleet(*line, env=env)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("zfleet: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [["--width", "63"], ["--model", "nope"], ["--steps", "0"], ["--seed", "-1"]])
def test_a_refused_field_is_named_in_one_line(flags: list[str], env: dict[str, str]) -> None:
    done = zfleet("generate", "x", "-o", "/tmp/never.png", *flags, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("zfleet: ") and done.stderr.count("\n") == 1
    assert flags[0].removeprefix("--") in done.stderr


def test_queue_and_workers(env: dict[str, str]) -> None:
    cards = json.loads(zfleet("workers", "--json", env=env).stdout)
    assert [card["device"] for card in cards] == ["cpu", "cpu"]
    assert all(card["name"] in zfleet("workers", env=env).stdout for card in cards)
    for priority in ("low", "high", "normal"):
        zfleet("submit", "x", "--priority", priority, env=env)
    rows = [line.split()[:2] for line in zfleet("queue", env=env).stdout.splitlines()[1:]]
    assert rows == [["simulated", "high"], ["simulated", "normal"], ["simulated", "low"]]


def test_a_template_from_its_list_to_a_picture(up: Up, env: dict[str, str], tmp_path: Path) -> None:
    listed = zfleet("templates", env=env).stdout
    assert "电商海报" in listed and "product* headline" in listed
    assert "poster" in {one["name"] for one in json.loads(zfleet("templates", "--json", env=env).stdout)}
    values = ["--set", "product=一罐龙井茶", "--set", "headline=a=b {slogan}"]
    size = ["--width", "128", "--height", "192", "--format", "png"]
    task_id = zfleet("submit", "--template", "poster", *values, *size, env=env).stdout.strip()
    with up.client() as client:
        view = client.wait(task_id, 20)
        assert client.generate("a fox", template="avatar", width=64, height=64).view.request.template == "avatar"
    assert (view.status, view.request.template, view.request.width) == ("succeeded", "poster", 128)
    assert "画面中央是一罐龙井茶" in view.request.prompt and "“a=b {slogan}”" in view.request.prompt
    refused = zfleet("generate", "--template", "poster", "-o", str(tmp_path / "x.png"), env=env)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "values.product: is required by template poster" in refused.stderr


def test_top_shows_this_fleet(up: Up, env: dict[str, str]) -> None:
    with up.client() as client:
        busy = [client.submit("x", n=8).task_id for _ in range(3)]
        eventually(lambda: any(worker.runs for worker in client.fleet().workers), within_s=20)
        once = zfleet("top", "--once", env=env)
        assert once.returncode == 0, once.stderr
        assert "HEALTHY" in once.stdout and all(card.name in once.stdout for card in client.workers())
        assert any(task_id[:12] in once.stdout for task_id in busy)
        for task_id in busy:
            client.cancel(task_id)


@pytest.mark.parametrize("leave", ["q", "\x03"], ids=["q", "ctrl-c"])
def test_top_on_a_terminal_until_it_is_left(env: dict[str, str], leave: str) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "zfleet", "top", "--interval", "0.2"], cwd=ROOT, env=env | {"TERM": "xterm-256color"},
        stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    until = time.monotonic() + 20
    while seen.count(b"HEALTHY") < 3 and time.monotonic() < until:
        seen += os.read(controller, 65536)
    os.write(controller, leave.encode())
    with contextlib.suppress(OSError):  # the terminal is gone
        while rest := os.read(controller, 65536):
            seen += rest
    assert process.wait(10) == 0
    os.close(controller)
    assert seen.count(b"HEALTHY") >= 3
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen, "the screen is given back"
    assert process.stderr is not None and process.stderr.read() == b""
    process.stderr.close()


def test_the_doctor_finds_this_fleet_well(up: Up, tmp_path: Path) -> None:
    env = environment(url=up.url, redis_url=up.redis_url, models="simulated", data_dir=tmp_path)
    done = zfleet("doctor", env=env)
    assert done.returncode == 0, done.stdout
    for line in ("ok       redis AOF", "ok       gateway:", "ok       gateway clock", "ok       templates"):
        assert line in done.stdout


def test_a_bad_template_stops_gateway_and_stack(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('model = "turbo"\nprompt = "a {cat}"\n')
    env = environment(templates_dir=tmp_path, data_dir=tmp_path / "data", models="simulated")
    for line in (["gateway", "--port", str(free_port())], ["up", "--port", str(free_port())]):
        done = zfleet(*line, env=env)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"zfleet: {tmp_path / 'own.toml'}:1: title: is required")
    gateway = [sys.executable, "-m", "gunicorn", "-c", "gateway/gunicorn_conf.py", "gateway.wsgi:app"]
    bare = subprocess.run(
        gateway, cwd=ROOT, env=env | {"ZFLEET_PORT": str(free_port())}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert bare.returncode != 0 and "own.toml:1: title: is required" in bare.stderr


def test_ctrl_c_stops_the_task_itself(up: Up, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zfleet", "generate", "x", "-n", "8", "-o", str(tmp_path / "x.png")]
    with up.client() as client:
        before = {task.task_id for task in client.tasks().tasks}
        busy = [client.submit("x", n=8).task_id for _ in range(4)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(url=up.url), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        eventually(lambda: {task.task_id for task in client.tasks().tasks} - before - set(busy), within_s=20)
        (mine,) = {task.task_id for task in client.tasks().tasks} - before - set(busy)
        time.sleep(0.3)  # until it waits
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert err.splitlines()[-1] == f"zfleet: task {mine} is canceled"
        assert client.wait(mine, 10).status == "canceled"
    assert list(tmp_path.iterdir()) == []


def test_the_client_from_python(up: Up) -> None:
    seen: list[str] = []
    with up.client() as client:
        made = client.generate("a red circle", steps=8, n=2, on_progress=lambda view: seen.append(view.status))
        assert [Image.open(io.BytesIO(data)).size for data in made.images] == [(64, 64)] * 2
        assert made.view.timings.total_ms is not None
        assert seen[-1] == "succeeded"
        assert client.models()[0].name == "simulated"
        assert client.health().status == "healthy"
        assert client.ready() is None
        with pytest.raises(Refused) as caught:
            client.submit("x", width=63)
        assert [error.loc for error in caught.value.errors] == ["width"]
        answer = client.submit("x", idempotency_key="twice")
        assert client.submit("x", idempotency_key="twice").task_id == answer.task_id
        with pytest.raises(Refused) as conflict:
            client.submit("y", idempotency_key="twice")
        assert conflict.value.code == "idempotency_conflict"
        page = client.tasks(limit=1)
        assert client.tasks(limit=1, cursor=page.next_cursor).tasks != page.tasks
        doomed = client.submit("x", n=8)
        client.cancel(doomed.task_id)
        assert str(TaskFailed(client.wait(doomed.task_id, 10))) == f"task {doomed.task_id} was canceled"


def test_gateway_and_worker_on_their_own(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    env = environment(redis_url=settings.redis_url, data_dir=settings.data_dir, simulated_image_ms=50)
    command = [sys.executable, "-m", "zfleet"]
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    gateway = Server([*command, "gateway", *flags], env=env | {"ZFLEET_MODELS": "simulated"}, log=tmp_path / "g")
    worker = Server([*command, "worker", "--models", "simulated", "--devices", "cpu"], env=env, log=tmp_path / "w")
    with gateway, worker, Client(f"http://127.0.0.1:{port}") as client:
        eventually(lambda: client.ready() is None, within_s=30)
        assert client.generate("x").view.status == "succeeded"
    assert gateway.process is not None and worker.process is not None
    assert (gateway.process.returncode, worker.process.returncode) == (0, 0)
