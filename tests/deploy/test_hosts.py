"""A fleet on several hosts by the commands of docs/deployment.md: each has an address, a name and a disk of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from common.errors import FleetError
from common.schemas import TaskView
from tests.faults.netns import Host, Switch
from tests.integration.guarded_redis import NAMES, USERS
from tests.s3server import BUCKET, KEY, SECRET
from tests.servers import Server, binary, eventually, free_port
from zfleet.client import Client

ZFLEET = [sys.executable, "-m", "zfleet"]
TASKS = 6


class Fleet(NamedTuple):
    """Its head has Redis, the gateway and a bucket; its workers have nothing but their GPUs."""

    client: Client
    hosts: dict[str, Host]
    head: str  # its address


class Machine:
    """Starts programs on a host as its operator would, with what its environment says and a disk of its own."""

    def __init__(self, name: str, host: Host, folder: Path) -> None:
        self.name, self.host, self.folder = name, host, folder / name
        self.folder.mkdir()

    def server(self, command: list[str], **settings: object) -> Server:
        given = {f"ZFLEET_{name.upper()}": str(value) for name, value in settings.items()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ZFLEET_")}
        bucket = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        named = [binary("unshare"), "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        env = kept | bucket | given | {"ZFLEET_DATA_DIR": str(self.folder / "data")}
        return self.host.run_here(Server([*named, *command], env=env, log=self.folder / "log"))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(Switch())
        names = ("head", "first", "second")
        hosts = {name: stack.enter_context(Host(switch)) for name in names}
        machines = {name: Machine(name, hosts[name], tmp_path) for name in names}
        address, head = hosts["head"].far_address, machines["head"]
        redis_port, s3_port, port = free_port(), free_port(), free_port()
        stack.enter_context(redis_on(head, redis_port))
        stack.enter_context(bucket_on(head, s3_port))
        common = {
            "models": "simulated", "storage": "s3", "s3_url": f"s3://{BUCKET}/fleet", "lease_s": 2.0, "beat_s": 0.4,
            "s3_endpoint": f"http://{address}:{s3_port}", "simulated_image_ms": 1_500.0, "max_batch": 2,
        }  # fmt: skip

        def url(user: str) -> str:
            return f"redis://{user}:{user}@{address}:{redis_port}/0"

        create = [*ZFLEET, "keys", "create", "--tenant", "acme"]
        env = os.environ | {"ZFLEET_REDIS_URL": url("operator")}
        key = subprocess.run(create, env=env, capture_output=True, text=True, check=True).stdout.strip()
        gateway = [*ZFLEET, "gateway", "--host", address, "--port", str(port)]
        stack.enter_context(head.server(gateway, redis_url=url("gateway"), **common))
        for name in names[1:]:
            worker = [*ZFLEET, "worker", "--devices", "cpu"]
            stack.enter_context(machines[name].server(worker, redis_url=url("worker"), **common))
        client = stack.enter_context(Client(f"http://{address}:{port}", api_key=key))
        yield Fleet(client, hosts, address)


def redis_on(head: Machine, port: int) -> Server:
    """Redis with the fleet's users, whose passwords are their names."""
    acl = USERS.read_text("utf-8")
    for name in NAMES:
        acl = acl.replace(f"{name.upper()}_PASSWORD_SHA256", hashlib.sha256(name.encode()).hexdigest())
    (head.folder / "users.acl").write_text(acl, "utf-8")
    options = {
        "--bind": head.host.far_address, "--port": str(port), "--dir": str(head.folder), "--appendonly": "yes",
        "--aclfile": str(head.folder / "users.acl"), "--maxmemory-policy": "noeviction",
    }  # fmt: skip
    return head.server([binary("redis-server"), *[part for option in options.items() for part in option]])


def bucket_on(head: Machine, port: int) -> Server:
    (head.folder / "buckets" / BUCKET).mkdir(parents=True)
    rclone = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--config", os.devnull]
    options = ["--addr", f"{head.host.far_address}:{port}", "--auth-key", f"{KEY},{SECRET}"]
    return head.server([*rclone, *options, str(head.folder / "buckets")])


def worker_of(view: TaskView) -> str:
    """The host of whoever has the task, or had it last; nothing before."""
    return view.attempts[-1].worker.split(".")[0] if view.attempts else ""


def test_tasks_run_across_hosts_and_one_that_vanishes_loses_none(fleet: Fleet) -> None:
    client, hosts, _ = fleet
    eventually(lambda: workers(client) == 2, within_s=60)
    task_ids = [client.submit("a red circle", model="simulated", width=64, height=64).task_id for _ in range(TASKS)]
    eventually(lambda: {"first", "second"} <= {worker_of(client.status(task_id)) for task_id in task_ids})
    hosts["first"].pull_cable()
    views = [client.wait(task_id, 60) for task_id in task_ids]
    assert [view.status for view in views] == ["succeeded"] * TASKS
    assert {worker_of(view) for view in views} <= {"first", "second"}
    lost = [attempt for view in views for attempt in view.attempts if attempt.outcome == "lost"]
    assert lost and all(attempt.worker.startswith("first.") for attempt in lost)
    assert all(worker_of(view) == "second" for view in views if any(a.outcome == "lost" for a in view.attempts))
    for view in views:
        (picture,) = client.images(view)
        assert hashlib.sha256(picture).hexdigest() == view.images[0].sha256, "it came from a disk of neither host"
    hosts["first"].plug_cable()
    eventually(lambda: workers(client) == 2, within_s=30)


def workers(client: Client) -> int:
    """How many workers the fleet's health counts; none while no gateway answers."""
    try:
        return client.health().workers
    except FleetError:
        return 0
