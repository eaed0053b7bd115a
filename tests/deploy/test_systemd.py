"""The units: well-formed, tight, and with room for what the parts of a fleet do, which run here in their sandbox."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.settings import Settings, child_environment, load_settings
from gateway import gunicorn_conf
from gateway.webhooks import courier
from tests.deploy import units
from tests.deploy.manager import Manager
from tests.receivers import Receiver
from tests.servers import RedisServer, Server, binary, eventually, free_port
from worker import supervisor
from worker.slot import Slot
from zfleet.client import Client
from zfleet.logs import Line, Search

DOCS = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text("utf-8")
EXPOSURE = {units.GATEWAY: 1.1, units.WEBHOOKS: 1.1, units.WORKER: 1.6}  # 0 is tight, 10 is open


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units as on a machine where zfleet is installed, but in a folder of their own."""
    folder = tmp_path_factory.mktemp("units")
    program = tmp_path_factory.mktemp("bin") / "zfleet"
    program.symlink_to(sys.executable)  # whose own path may have a space, which a unit would have to quote
    for path in units.FOLDER.iterdir():
        text = path.read_text("utf-8").replace("/opt/zfleet/bin/zfleet", str(program))
        (folder / path.name).write_text(text)
    return folder


def test_systemd_finds_no_fault_in_them(installed: Path) -> None:
    names = [str(installed / name.replace("@", "@0")) for name in (*units.SERVICES, "zfleet.target")]
    (installed / "zfleet-worker@0.service").symlink_to(installed / units.WORKER)
    command = [binary("systemd-analyze"), "verify", "--man=no", "--recursive-errors=yes", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", units.SERVICES)
def test_each_is_as_tight_as_the_docs_say(unit: str) -> None:
    command = [binary("systemd-analyze"), "security", "--offline=true", f"--threshold={round(EXPOSURE[unit] * 10)}"]
    done = subprocess.run([*command, str(units.FOLDER / unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (exposure,) = re.findall(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert float(exposure) == EXPOSURE[unit], "write it into the docs, and here"
    assert re.search(rf"\| `{re.escape(unit)}` \|.*\| {exposure} \|", DOCS)


@pytest.mark.parametrize("unit", units.SERVICES)
def test_each_keeps_to_what_every_part_has_to(unit: str) -> None:
    told = units.directives(unit)
    wanted = {
        "Type": "notify", "NotifyAccess": "main", "Restart": "always", "User": "zfleet", "NoNewPrivileges": "yes",
        "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "CapabilityBoundingSet": "",
        "LogsDirectory": "zfleet", "DevicePolicy": "closed", "WatchdogSec": "60s", "PartOf": "zfleet.target",
    }  # fmt: skip
    assert {name: told[name] for name in wanted} == {name: [value] for name, value in wanted.items()}
    assert "ZFLEET_LOG_DIR=%L/zfleet" in told["Environment"][0].split(), "gpu.csv, and what `zfleet logs` reads"
    assert {"RestartSec", "StartLimitIntervalSec", "StartLimitBurst", "LimitNOFILE", "SystemCallFilter"} <= told.keys()


def test_the_worker_sees_gpus_and_the_others_no_device() -> None:
    assert units.directives(units.WORKER)["DeviceAllow"] == ["char-nvidia* rw"]
    assert "PrivateDevices" not in units.directives(units.WORKER), "it would hide them"
    for unit in (units.GATEWAY, units.WEBHOOKS):
        assert units.directives(unit)["PrivateDevices"] == ["yes"] and "DeviceAllow" not in units.directives(unit)


def test_who_is_stopped_has_the_time_that_it_takes() -> None:
    def stop_s(unit: str) -> int:
        return int(units.directives(unit)["TimeoutStopSec"][0].removesuffix("s"))

    assert stop_s(units.GATEWAY) > gunicorn_conf.graceful_timeout
    assert stop_s(units.WEBHOOKS) > courier.STOP_S + Settings().redis_patience_s
    assert stop_s(units.WORKER) > Settings().drain_s + supervisor.KILL_MARGIN_S  # a longer drain asks for more time


@pytest.mark.parametrize("unit", units.SERVICES)
def test_what_it_runs_is_a_command_of_ours(unit: str) -> None:
    program, *arguments = units.directives(unit)["ExecStart"][0].replace("%i", "0").split()
    assert program == "/opt/zfleet/bin/zfleet"
    command = [sys.executable, "-m", "zfleet", *arguments, "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_fleet_works_in_the_sandbox(stack: contextlib.ExitStack, redis_session: RedisServer, tmp_path: Path) -> None:
    """All parts, with the system calls, address families, capabilities and folders that their units leave them."""
    if os.geteuid() != 0:
        pytest.fail("only root may take a file system's writability away; run this test as root, as in a container")
    redis_session.flush()
    data, temporary, logs = tmp_path / "data", tmp_path / "tmp", tmp_path / "logs"
    for folder in (data, temporary, logs):
        folder.mkdir()
    receiver = stack.enter_context(Receiver(tmp_path))

    def story(task_id: str) -> list[Line]:
        return Search([logs], task=task_id).gather().lines

    settings = load_settings(
        {
            "redis_url": redis_session.url, "data_dir": data, "log_dir": logs, "models": ("simulated",),
            "devices": "cpu", "port": free_port(), "webhook_allow": (receiver.netloc,),
        }
    )  # fmt: skip
    parts = {units.GATEWAY: "gateway", units.WEBHOOKS: "webhooks", units.WORKER: "worker"}
    managers = []
    for unit, part in parts.items():
        (tmp_path / part).mkdir()
        managers.append(stack.enter_context(Manager(tmp_path / part)))
        env = child_environment(
            settings, TMPDIR=str(temporary), SSL_CERT_FILE=str(receiver.certificate), **managers[-1].environment(30.0)
        )
        command = units.sandboxed(unit, [sys.executable, "-m", "zfleet", part], data, temporary, logs)
        stack.enter_context(Server(command, env=env, log=data / f"{part}.log"))
    for manager in managers:
        manager.await_line("READY=1")
    with Client(f"http://127.0.0.1:{settings.port}") as client:
        view = client.wait(client.submit("a red circle", webhook={"url": f"https://{receiver.netloc}/hook"}).task_id)
        assert view.status == "succeeded", view.error
        assert [len(picture) > 100 for picture in client.images(view)] == [True]
    eventually(lambda: [heard.told["type"] for heard in receiver.heard][-1:] == ["task.ended"])
    eventually(lambda: {"gateway", "worker", "webhooks"} <= {line.role for line in story(view.task_id)})


def test_the_environment_file_has_settings_and_no_password() -> None:
    text = (units.FOLDER / "zfleet.env").read_text("utf-8")
    names = set(re.findall(r"^#?([A-Z0-9_]+)=", text, re.MULTILINE))
    assert {name for name in names if not name.startswith("OTEL_")} <= {
        f"ZFLEET_{n.upper()}" for n in Settings.model_fields
    }
    assert not names & {"ZFLEET_REDIS_URL", "AWS_SECRET_ACCESS_KEY", "OTEL_EXPORTER_OTLP_HEADERS"}
    assert {"ZFLEET_S3_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"} <= names
    for unit in units.SERVICES:
        shared, own = units.directives(unit)["EnvironmentFile"]
        assert shared == "-/etc/zfleet/zfleet.env" and own in DOCS.replace("$part", own.split("/")[-1].split(".")[0])


def test_a_supervisor_for_each_gpu_gives_no_name_twice() -> None:
    alone = [Slot(0, home=gpu, device=gpu) for gpu in ("0", "1")]  # each is the first of its supervisor
    assert [slot.place for slot in alone] == ["gpu0", "gpu1"]
    alone[1].device = "cpu"  # which stands in while the GPU is lost
    assert alone[1].place == "cpu1"
    several = [Slot(index, "0", "0", nth=index) for index in range(2)] + [
        Slot(0, "cpu", "cpu"),
        Slot(1, "cpu", "cpu", 1),
    ]
    assert [slot.place for slot in several] == ["gpu0", "gpu0-1", "cpu0", "cpu1"]
