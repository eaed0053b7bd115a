"""The local stack: it comes up anywhere, mends itself, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.integration.zfleet_command import ROOT, UP_WITHIN_S, Up, assert_gone, environment, zfleet
from tests.receivers import Receiver
from tests.servers import RedisServer, eventually
from worker.pico.judge import judge
from worker.pico.scenes import Scene, Thing
from zfleet.commands.local import DEMO_PROMPT

SHOWN = Scene((Thing("circle", "red", place="left"), Thing("square", "blue", place="right")))  # by the demo
STOPS_WITHIN_S = 40.0
PARTS = 5  # guardian, Redis, gateway, courier, worker: what a stack starts itself


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Listen on a port; somebody else's doing so already is as good."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError:
        yield
    else:
        with listener:
            yield


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    with Up(tmp_path / "a b") as up:
        family = up.family()
        assert len(family) >= PARTS + 2  # and gunicorn's worker, and ours
        up.signal(signal.SIGINT)
        assert up.process is not None
        assert up.process.wait(STOPS_WITHIN_S) == 0
        assert_gone(family, within_s=0)
        assert up.said().rstrip().endswith("Stopped.")
    with socket.create_server(("127.0.0.1", up.port)):
        pass


def test_sigterm_lets_finish_what_runs_and_the_next_run_does_the_rest(tmp_path: Path) -> None:
    with Up(tmp_path, simulated_image_ms=1500) as up, up.client() as client:
        task_ids = [client.submit("x").task_id for _ in range(3)]
        eventually(lambda: client.status(task_ids[0]).status == "running", within_s=30)
        assert up.stop(STOPS_WITHIN_S) == 0
    with Up(tmp_path) as up, up.client() as client:
        views = [client.wait(task_id, 30) for task_id in task_ids]
        assert {view.status for view in views} == {"succeeded"}
        assert [attempt.outcome for attempt in views[0].attempts] == ["succeeded"]
        assert client.images(views[0])


def test_a_data_directory_has_one_stack(tmp_path: Path) -> None:
    with Up(tmp_path) as up:
        second = zfleet("up", "--model", "simulated", env=up.env)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert f"process {up.pid}, at {up.url}, already uses" in second.stderr
        with up.client() as client:
            client.generate("x")


def test_taken_ports_are_replaced_and_that_is_said(tmp_path: Path) -> None:
    with taken(6379), socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Up(tmp_path, "--port", str(port)) as up:
            assert f"Port {port} is taken; the gateway gets" in up.said()
            assert "Port 6379 is taken; Redis gets" in up.said()
            assert f":{port}" not in up.url
            with up.client() as client:
                client.generate("x")


def test_kill_9_leaves_nothing_behind_and_the_next_start_works(tmp_path: Path) -> None:
    with Up(tmp_path, simulated_image_ms=2000) as up, up.client() as client:
        family = up.family()
        task_id = client.submit("x").task_id
        eventually(lambda: client.status(task_id).status == "running", within_s=30)
        os.killpg(up.pid, signal.SIGKILL)
        up.kill()
    with Up(tmp_path) as again, again.client() as client:  # while the old one may still be on its way out
        assert_gone(family, within_s=0)
        assert client.wait(task_id, 30).status == "succeeded"


def test_what_dies_is_started_again(tmp_path: Path) -> None:
    with Up(tmp_path, redis_timeout_s=0.5) as up, up.client() as client:
        for times, mark in enumerate(("redis-server", "gunicorn", "gateway.webhooks", "-m worker"), 1):
            done = client.generate("x").view.task_id
            victim = up.member(mark)
            victim.kill()
            eventually(lambda times=times: up.said().count("starting it again") == times, within_s=30)
            eventually(lambda mark=mark, victim=victim: up.member(mark).pid != victim.pid, within_s=30)
            eventually(lambda: client.ready() is None, within_s=60)
            assert client.generate("x", timeout_s=60).view.status == "succeeded"
            assert client.status(done).status == "succeeded"
        family = up.family()
    assert_gone(family, within_s=0)


def test_webhooks_are_told(tmp_path: Path) -> None:
    with Receiver() as receiver, Up(tmp_path, webhook_allow=receiver.netloc) as up, up.client() as client:
        task_id = client.submit("x", webhook={"url": receiver.url}).task_id
        eventually(lambda: receiver.heard, within_s=30)
        assert receiver.heard[0].told["data"]["task_id"] == task_id
        eventually(lambda: client.status(task_id).webhook.deliveries[0].state == "delivered")


@pytest.mark.parametrize(
    ("command", "children", "codes"),
    [
        ("up", 0, {0, 130, -signal.SIGINT}),  # before Python itself is up, SIGINT just ends it
        ("up", 1, {0}),
        ("demo", 3, {130}),
    ],
)
def test_ctrl_c_while_starting_leaves_nothing_behind(
    command: str, children: int, codes: set[int], tmp_path: Path
) -> None:
    env = environment(data_dir=tmp_path / "data", simulated_load_ms=60_000) | {"TMPDIR": str(tmp_path)}
    flags = ["--out", str(tmp_path / "x.webp")] if command == "demo" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "zfleet", command, "--model", "simulated", *flags],
        cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        time.sleep(0.3)
        eventually(lambda: len(psutil.Process(process.pid).children()) >= children, within_s=UP_WITHIN_S)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=STOPS_WITHIN_S)
    finally:
        process.kill()
    assert process.returncode in codes, err
    assert_gone(family, within_s=1)
    assert not list(tmp_path.glob("zfleet-demo-*"))


def test_a_second_ctrl_c_does_not_wait_for_what_runs(tmp_path: Path) -> None:
    with Up(tmp_path, simulated_image_ms=60_000, drain_s=60) as up, up.client() as client:
        task_id = client.submit("x").task_id
        eventually(lambda: client.status(task_id).status == "running", within_s=30)
        family = up.family()
        up.signal(signal.SIGINT)
        eventually(lambda: "Stopping" in up.said())
        up.signal(signal.SIGINT)
        assert up.process is not None
        assert up.process.wait(STOPS_WITHIN_S) == 0  # of the 60 s that it may drain
        assert_gone(family, within_s=1)


def test_a_model_that_cannot_be_loaded_is_told_and_all_is_stopped(tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text('[mine]\nsource = "x"\npipeline = "steam"\n')
    env = environment(data_dir=tmp_path / "data", models_file=models)
    done = zfleet("up", "--model", "mine", env=env, timeout_s=100)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("zfleet: the worker failed: ")
    assert "'steam'" in last
    assert not [p for p in psutil.process_iter(["environ"]) if str(tmp_path) in str(p.info["environ"])]


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = zfleet("up", "--model", "simulated", env=environment(data_dir=tmp_path, devices="77"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("zfleet: devices: '77'")


def test_a_redis_of_the_users_own_is_used_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis_server:
        with Up(tmp_path, redis_url=redis_server.url) as up, up.client() as client:
            client.generate("x")
            assert up.redis_url == redis_server.url
            assert len(psutil.Process(up.pid).children()) == PARTS - 1
        assert redis_server.client.ping()


def test_a_redis_that_does_not_answer_is_told(tmp_path: Path) -> None:
    env = environment(data_dir=tmp_path, redis_url="redis://:secret@127.0.0.1:1/0", redis_patience_s=0.5)
    done = zfleet("up", "--model", "simulated", env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "zfleet: no Redis answers at redis://:***@127.0.0.1:1/0"


def test_a_data_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = zfleet("up", "--model", "simulated", env=environment(data_dir=tmp_path / "file" / "data"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_it_works_from_a_path_with_a_space_and_beside_folders_of_the_same_names(tmp_path: Path) -> None:
    home = tmp_path / 'a "quoted" path'
    for package in ("common", "gateway", "worker", "zfleet"):
        shutil.copytree(ROOT / package, home / package, ignore=shutil.ignore_patterns("__pycache__"))
    users = tmp_path / "users"
    (users / "worker").mkdir(parents=True)
    (users / "worker" / "__init__.py").write_text("raise SystemExit('this is not zfleet')")
    env = environment(data_dir="data dir", x_accel="/_results/", redis_url="redis://127.0.0.1:1/0") | {
        "PYTHONPATH": str(home),
        "PYTHONSAFEPATH": "1",
    }
    prompt = '它说 "hi" & $HOME'
    done = zfleet("demo", "--model", "simulated", "--prompt", prompt, "--out", "new/x.png", cwd=users, env=env)
    assert done.returncode == 0, done.stderr
    assert f": {prompt}\n" in done.stderr
    assert Image.open(users / "new" / "x.png").format == "PNG"


def test_the_demo_paints_with_pico_and_stops_everything(tmp_path: Path) -> None:
    env = environment(data_dir=tmp_path / "data") | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "zfleet", "demo", "--out", str(tmp_path / "x.webp")]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: set[psutil.Process] = set()
    until = time.monotonic() + UP_WITHIN_S + 40
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.1)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'x.webp'}\n"
    picture = Image.open(tmp_path / "x.webp")
    assert (picture.format, picture.size) == ("WEBP", (128, 128))
    assert len(family) >= PARTS + 2
    assert_gone(list(family), within_s=0)
    assert not list(tmp_path.glob("zfleet-demo-*")), "its folder is gone"
    assert not (tmp_path / "data").exists(), "pico ships with the package: nothing to keep"
    assert judge(np.asarray(picture.convert("RGB")), SHOWN).matches, DEMO_PROMPT
