"""Images and compose file: what linters say, and that everything they name is there and does what they expect of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import redis
import yaml

from common.broker import Broker
from common.settings import Settings, child_environment, load_settings
from tests.deploy import images
from tests.deploy.images import FOLDER, IMAGES, ROOT
from tests.fleet import await_final, await_running, ready_workers, submit_many
from tests.integration.nginx_edge import nginx_binary
from tests.servers import Server, binary, eventually, free_port
from worker import supervisor
from zfleet.commands import serve

PARTS = {"gateway": "gateway", "webhooks": "courier", "worker": "worker", "operator": "operator"}  # and Redis' users
ON_TOP = ("compose.s3.yaml", "compose.traces.yaml")
OPTIONAL = ("AWS_", "COMPOSE_", "OTEL_", "ZFLEET_S3_")  # what only these, or their users, know
DRAIN_MARGIN_S = supervisor.KILL_MARGIN_S + 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after prepare.py."""
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(FOLDER / "compose.yaml", folder)
    prepare(folder)
    return folder


def gigabytes(limit: str) -> int:
    """Return a limit such as 4g in bytes."""
    return int(limit.removesuffix("g")) << 30


def prepare(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "prepare.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def compose(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(OPTIONAL)}
    command = [binary("docker-compose"), "config"]
    return subprocess.run(command, cwd=folder, env=env | more, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def composed(prepared: Path) -> Any:
    """The services as docker-compose understands them."""
    done = compose(prepared)
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(done.stdout)["services"]


# ---- images


@pytest.mark.parametrize("image", IMAGES)
def test_the_linter_has_nothing_to_say(image: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--failure-threshold", "warning", str(FOLDER / f"Dockerfile.{image}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_has_no_root_and_says_how_it_is(image: str) -> None:
    assert len(images.of(image, "FROM")) == 2, "what builds it is left behind"
    for base in images.of(image, "FROM"):
        assert re.match(r"[a-z]+:[0-9]+\.[0-9]+[a-z0-9.-]*( AS \w+)?$", base.text), (
            "an image's plain name, and a version"
        )
    (install,) = [run.text for run in images.of(image, "RUN") if "pip install" in run.text]
    assert "-c constraints.txt" in install
    extras = images.extras(image)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= known.keys() and image in extras
    assert ("torch" in images.not_installed(image)) == (image == "gateway")
    (user,) = images.of(image, "USER")
    assert user.last and re.fullmatch(r"[1-9][0-9]+:[1-9][0-9]+", user.text), (
        "by number, so that it is seen to be no root"
    )
    (check,) = images.of(image, "HEALTHCHECK")
    assert json.loads(check.text.split(" CMD ")[1]) == ["zfleet", "alive"]
    assert json.loads(images.of(image, "CMD")[0].text) == ["zfleet", image]


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there_and_not_left_out(image: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    for source in images.copied(image):
        assert (ROOT / source).exists() and f"!{source}" in ignored


@pytest.mark.parametrize(
    ("image", "modules"),
    [
        ("gateway", "gateway.app, gateway.gunicorn_worker, gateway.webhooks.__main__, zfleet.commands.keys"),
        ("worker", "worker.__main__, worker.supervisor, worker.gpu_worker, zfleet.commands.serve"),
    ],
)
def test_what_is_copied_and_installed_is_enough(image: str, modules: str, tmp_path: Path) -> None:
    packages = [source for source in images.copied(image) if (ROOT / source).is_dir()]
    for package in packages:
        (tmp_path / package).symlink_to(ROOT / package)
    left_out = {"common", "gateway", "worker", "zfleet"}.difference(packages) | images.not_installed(image)
    program = f"""
import sys
class LeftOut:
    def find_spec(self, name, path=None, target=None):
        if name in {left_out}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, LeftOut())
import {modules}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the compose file


def test_its_services_are_confined_and_limited(composed: Any) -> None:
    assert composed.keys() == {"redis", "gateway", "webhooks", "worker", "nginx", "operator"}
    for name, service in composed.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"] and service["pids_limit"], name
        assert service["restart"] == ("no" if name == "operator" else "unless-stopped"), name
        assert "ports" in service if name == "nginx" else "ports" not in service, "Nginx is the only way in"
        assert ":" not in service["image"] or re.fullmatch(r"[a-z]+:[0-9]+\.[0-9]+-[a-z]+", service["image"]), name
    assert composed["nginx"]["ports"] == ["127.0.0.1:8080:8080/tcp"]
    assert set(composed["redis"]["networks"]) == set(composed["gateway"]["networks"]) == {"fleet"}
    (device,) = composed["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for name in ("gateway", "worker"):
        assert composed[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
        assert any(volume.startswith("results:/var/lib/zfleet/results") for volume in composed[name]["volumes"])
    assert "results:/var/lib/zfleet/results:ro" in composed["nginx"]["volumes"]


def test_who_is_stopped_has_the_time_that_it_takes(composed: Any) -> None:
    worker = composed["worker"]
    seconds = {"1m0s": 60, "1m": 60}.get(worker["stop_grace_period"]) or int(worker["stop_grace_period"].rstrip("s"))
    assert seconds >= float(worker["environment"]["ZFLEET_DRAIN_S"]) + DRAIN_MARGIN_S


@pytest.mark.parametrize("part", PARTS)
def test_every_setting_is_one_and_every_part_has_its_own_user(part: str, composed: Any) -> None:
    service = composed[part]
    names = {*service["environment"], *(images.environment(part) if part in IMAGES else ())}
    known = {f"ZFLEET_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in names if name.startswith("ZFLEET_")} <= known
    assert service["environment"]["ZFLEET_REDIS_URL"].startswith(f"redis://{PARTS[part]}:")


def test_the_environment_file_and_the_compose_file_name_the_same(prepared: Path) -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)\}", (FOLDER / "compose.yaml").read_text("utf-8")))
    example = (FOLDER / ".env.example").read_text("utf-8")
    assert used == set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
    on_top = "".join((FOLDER / name).read_text("utf-8") for name in ON_TOP)
    passed = set(re.findall(r"\$\{([A-Z0-9_]+)|^    ([A-Z0-9_]+):$", on_top, re.MULTILINE))
    offered = set(re.findall(r"^# ([A-Z0-9_]+)=", example, re.MULTILINE))
    assert {name for pair in passed for name in pair if name} == {
        name for name in offered if not name.startswith(("AWS_", "COMPOSE_"))
    }
    assert not re.search(r"PASSWORD=.", example)
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert {"/deploy/compose/.env", "/deploy/compose/made/"} <= set(ignored)


@pytest.fixture
def with_more(tmp_path: Path) -> Callable[..., Path]:
    """A folder as after prepare.py, with further lines in its `.env`."""

    def prepared_with(*lines: str) -> Path:
        for name in ("compose.yaml", *ON_TOP):
            shutil.copy(FOLDER / name, tmp_path)
        shutil.copy(FOLDER / ".env.example", tmp_path / ".env")
        with (tmp_path / ".env").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in ("COMPOSE_FILE=" + ":".join(("compose.yaml", *ON_TOP)), *lines))
        prepare(tmp_path)
        return tmp_path

    return prepared_with


def test_a_bucket_and_traces_are_told_to_those_who_use_them(
    with_more: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "COMPOSE_FILE=compose.yaml:" + ":".join(ON_TOP) in (FOLDER / ".env.example").read_text("utf-8")
    folder = with_more(
        "ZFLEET_S3_URL=s3://pictures", "ZFLEET_S3_REGION=eu-central-1", "AWS_ACCESS_KEY_ID=its-id",
        "AWS_SECRET_ACCESS_KEY='its/secret+='", "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",
    )  # fmt: skip
    done = compose(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "its/secret" not in done.stdout and "its-id" not in done.stdout
    whole = yaml.safe_load(done.stdout)
    plain = yaml.safe_load(compose(folder, COMPOSE_FILE="compose.yaml").stdout)["services"]
    for name, service in whole["services"].items():
        if name not in IMAGES:
            assert service | {"networks": set(service["networks"])} == plain[name] | {
                "networks": set(plain[name]["networks"])
            }, "as without them"
            continue
        told = {name: value for name, value in service["environment"].items() if value is not None}
        assert told.items() >= plain[name]["environment"].items()
        assert (told["OTEL_EXPORTER_OTLP_ENDPOINT"], "OTEL_TRACES_SAMPLER" in told) == ("http://collector:4318", False)
        settings = load_settings(
            {key.removeprefix("ZFLEET_").lower(): value for key, value in told.items() if key.startswith("ZFLEET_S")}
        )
        assert (settings.storage, settings.s3_url, settings.s3_region) == ("s3", "s3://pictures", "eu-central-1")
        named = {f"ZFLEET_{name.upper()}" for name in Settings.model_fields if name.startswith("s3_")}
        assert named <= service["environment"].keys(), "one that is new has to be passed on, too"
        assert service["networks"].keys() == {"fleet", "outside"}
        assert [secret["source"] for secret in service["secrets"]] == ["aws"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", whole["secrets"]["aws"]["file"])
    found = boto3.session.Session().get_credentials()
    assert found is not None and (found.access_key, found.secret_key) == ("its-id", "its/secret+=")


def test_a_bucket_that_is_not_named_is_missed_and_its_key_need_not_be(with_more: Callable[..., Path]) -> None:
    folder = with_more("OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318")
    done = compose(folder)
    assert done.returncode != 0 and "ZFLEET_S3_URL" in done.stderr and "s3://bucket/folder" in done.stderr
    assert (folder / "made" / "aws").read_text("utf-8") == "", "the machine's role"


def test_prepare_keeps_what_was_changed(tmp_path: Path) -> None:
    prepare(tmp_path)
    path = tmp_path / ".env"
    before = path.read_text("utf-8").replace("ZFLEET_MODELS=turbo", "ZFLEET_MODELS=pico")
    path.write_text(before, "utf-8")
    done = prepare(tmp_path)
    assert path.read_text("utf-8") == before and path.stat().st_mode & 0o777 == 0o600
    passwords = re.findall(r"_PASSWORD=([0-9a-f]{64})$", before, re.MULTILINE)
    assert len(set(passwords)) == 4
    made = done.stdout + "".join(path.read_text("utf-8") for path in (tmp_path / "made").iterdir())
    assert not any(password in made for password in passwords)


@pytest.mark.parametrize("password", ['"quoted"', "a b", "a$b", "p@ss/word", "x # y"])
def test_a_password_that_urls_or_compose_would_read_as_another_is_refused(tmp_path: Path, password: str) -> None:
    told = f"GATEWAY_PASSWORD={password}\nWORKER_PASSWORD=\nCOURIER_PASSWORD=\nOPERATOR_PASSWORD=\n"
    (tmp_path / ".env").write_text(told, "utf-8")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        prepare(tmp_path)
    assert "GATEWAY_PASSWORD may have" in failed.value.stderr and password.strip() not in failed.value.stderr
    assert not (tmp_path / "made").exists() and "WORKER_PASSWORD=\n" in (tmp_path / ".env").read_text("utf-8")


def test_redis_takes_its_command_and_its_users(prepared: Path, composed: Any, tmp_path: Path) -> None:
    told = {"/data": str(tmp_path), "/run/secrets/users.acl": str(prepared / "made" / "users.acl")}
    command = composed["redis"]["command"]
    for inside, here in told.items():
        command = [part.replace(inside, here) for part in command]
    port = free_port()
    with Server([binary("redis-server"), *command[1:], f"--port {port}"], log=tmp_path / "log"):
        check = composed["redis"]["healthcheck"]["test"][1].replace("redis-cli", f"redis-cli -p {port}")
        key = {"REDISCLI_AUTH": composed["redis"]["environment"]["REDISCLI_AUTH"]}
        eventually(lambda: subprocess.run(["sh", "-c", check], env=os.environ | key, check=False).returncode == 0)
        for part in PARTS:
            url = composed[part]["environment"]["ZFLEET_REDIS_URL"].replace("redis:6379", f"127.0.0.1:{port}")
            with redis.Redis.from_url(url) as client:
                assert client.ping()
        user = composed["operator"]["environment"]["ZFLEET_REDIS_URL"].replace("redis:6379", f"127.0.0.1:{port}")
        with redis.Redis.from_url(user) as client:
            limit = client.info("memory")["maxmemory"]
        assert 0 < limit <= gigabytes(composed["redis"]["mem_limit"]) / 2, "it would be killed before it says no"
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_nginx_takes_its_configuration(prepared: Path, tmp_path: Path) -> None:
    text = (prepared / "made" / "nginx.conf").read_text("utf-8")
    for inside in ("/run/zfleet", "/var/log/nginx"):
        assert inside in text
        text = text.replace(inside, str(tmp_path))
    text = text.replace("gateway:8080", "127.0.0.1:8080")  # whom only the fleet's network knows by name
    conf = tmp_path / "nginx.conf"
    conf.write_text(text, "utf-8")
    command = [nginx_binary(), "-t", "-p", str(tmp_path), "-c", str(conf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- what the images run


@pytest.fixture
def first_process(settings: Settings, tmp_path: Path) -> Iterator[Server]:
    """A worker as the first process of a process namespace of its own, as in a container."""
    given = settings.model_copy(
        update={
            "models": ("simulated",), "simulated_image_ms": 1_200.0, "max_batch": 1, "drain_s": 6.0,
            "alive_file": tmp_path / "alive",
        }
    )  # fmt: skip
    apart = [binary("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"]
    with Server(
        [*apart, sys.executable, "-m", "zfleet", "worker"], env=child_environment(given), log=tmp_path / "log"
    ) as server:
        yield server


def alive(folder: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "zfleet", "alive", *flags]
    env = child_environment(load_settings({"alive_file": folder / "alive"}))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout or done.stderr


def test_a_worker_that_is_the_first_process_drains_and_its_probe_tells_the_truth(
    first_process: Server, broker: Broker, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.fail("only root may make process namespaces; run this test as root, as in a container")
    ready_workers(broker, 1)
    eventually(lambda: alive(tmp_path, "--ready") == (0, "ready 1 of 1 workers ready\n"))
    begun, waiting = submit_many(broker, 2, steps=20)
    await_running(broker, [begun])
    (inside,) = psutil.Process(first_process.pid).children()
    inside.send_signal(signal.SIGTERM)
    (done,) = await_final(broker, [begun], within_s=20)
    assert done.status == "succeeded" and len(done.attempts) == 1
    assert first_process.process is not None and first_process.process.wait(20) == 0
    left = broker.view(waiting)
    assert left is not None and left.status == "queued", "it was given back, or never begun"
    os.utime(tmp_path / "alive", (time.time() - 60,) * 2)
    code, said = alive(tmp_path)
    assert code == 1 and "the last sign of life was 6" in said
    (tmp_path / "alive").unlink()
    assert alive(tmp_path)[0] == 1


def test_a_probe_that_knows_no_file_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ZFLEET_")}
    done = subprocess.run(
        [sys.executable, "-m", "zfleet", "alive"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, serve.alive.name) == (2, "alive") and "ZFLEET_ALIVE_FILE is not set" in done.stderr
