"""Each check of `zfleet doctor`, fine and failing. Redis, Nginx and torch are real; only NVML and CUDA are made up."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

import common
from common.broker import Broker
from common.cards import GpuReading
from common.errors import ConfigurationError
from common.models import load_catalogue
from common.redisstate import RedisFacts
from common.settings import Settings, load_settings
from tests.collector import Collector
from tests.integration.guarded_redis import GuardedRedis
from tests.integration.nginx_edge import load_render
from tests.s3server import BUCKET, S3Server, show_credentials
from tests.servers import RedisServer, free_port
from tests.unit.zfleet.stub import Reply, StubGateway, problem
from worker import pico
from zfleet import cli
from zfleet.doctor import compute, edge, files, folders, storage, store
from zfleet.doctor.report import Finding, Patient, examine

TURBO = load_catalogue()["turbo"]
DRIVER = compute.Driver("570.1", (12, 8))


def gpu(total_mb: int | None = 24_000, index: int = 0) -> GpuReading:
    return GpuReading(name="NVIDIA L4", index=index, memory_total_mb=total_mb)


def states(found: Iterable[Finding]) -> dict[str, str]:
    return {one.check: one.state for one in found}


def needs_a_remedy(found: Iterable[Finding]) -> None:
    assert all(one.remedy for one in found if one.state == "problem")


# What computes


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "problem"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 99), "warning")]
)
def test_python_is_one_that_was_tested(version: tuple[int, int], state: str) -> None:
    assert compute.python(version).state == state


def test_torch_as_it_is_here() -> None:
    assert states(compute.torch(None, [], compute.PROBE)) == {"torch": "ok", "cuda": "skipped"}


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        ("import os; os.abort()", "signal 6"),
        ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13"),
        ("print('no json')", "exit code 0"),
    ],
    ids=["crash", "import", "stranger"],
)
def test_a_torch_that_cannot_be_used_takes_nobody_down(probe: str, says: str) -> None:
    (found,) = compute.torch(DRIVER, [gpu()], probe)
    assert (found.state, says in found.says) == ("problem", True) and found.remedy


def test_a_torch_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "PROBE_S", 0.2)
    (found,) = compute.torch(None, [], "import time; time.sleep(60)")
    assert found.state == "problem" and "0.2 s" in found.says


def test_an_old_torch_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "version", lambda _: "2.4.1+cu121")
    assert states(compute.torch(None, [], "print('{}')"))["torch"] == "problem"
    monkeypatch.setattr(compute.importlib.util, "find_spec", lambda _: None)
    assert states(compute.torch(None, [], compute.PROBE)) == {"torch": "skipped"}
    assert compute.look() == (None, [])
    assert compute.driver_says(None).state == "skipped"


@pytest.mark.parametrize(
    ("said", "state", "word"),
    [
        ({"cuda": "12.8", "devices": 1}, "ok", "1 of 1 GPUs compute"),
        ({"cuda": None, "devices": 0}, "problem", "without CUDA"),
        ({"cuda": "13.0", "devices": 0}, "problem", "wants CUDA 13.0; driver 570.1 serves 12.8"),
        ({"cuda": "12.8", "devices": 0}, "problem", "finds no GPU"),
    ],
    ids=["fine", "cpu build", "old driver", "hidden"],
)
def test_cuda_serves_the_gpus(said: dict[str, Any], state: str, word: str) -> None:
    found = compute.cuda(said, DRIVER, [gpu()])
    assert found.state == state and word in found.says
    needs_a_remedy([found])


@pytest.mark.parametrize(
    ("total_mb", "state"), [(80_000, "ok"), (16_000, "warning"), (8_000, "problem"), (None, "skipped")]
)
def test_a_gpu_holds_the_model_whole_in_parts_or_not(total_mb: int | None, state: str) -> None:
    (found,) = compute.memory(TURBO, [gpu(total_mb)], "all")
    assert (found.check, found.state) == ("gpu memory for turbo", state)
    needs_a_remedy([found])


def test_only_the_gpus_of_the_workers_count() -> None:
    found = list(compute.memory(TURBO, [gpu(8_000), gpu(24_000, 1)], "1"))
    assert [one.state for one in found] == ["ok"]
    assert states(compute.memory(TURBO, [gpu()], "cpu")) == {"gpu memory for turbo": "skipped"}
    assert states(compute.memory(load_catalogue()["pico"], [], "all")) == {"gpu memory for pico": "ok"}


def test_the_driver_tells_its_version() -> None:
    assert compute.driver_says(DRIVER).says == "570.1, for CUDA up to 12.8"


# Disk and models


@pytest.fixture
def patient(settings: Settings) -> Patient:
    return Patient(settings=settings)


@pytest.mark.parametrize(
    ("pause", "resume", "state"), [(100.0, 99.9, "ok"), (100.0, 0.001, "warning"), (0.002, 0.001, "problem")]
)
def test_the_disk_has_room(settings: Settings, pause: float, resume: float, state: str) -> None:
    update = {"disk_pause_percent": pause, "disk_resume_percent": resume}
    found = list(files.disk(Patient(settings=settings.model_copy(update=update))))
    assert states(found) == {"disk": state}
    needs_a_remedy(found)


def test_a_disk_that_may_not_be_written(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # whoever runs this may be root
    (found,) = files.disk(patient)
    assert found.state == "problem" and "may not be written" in found.says


def test_the_disk_is_that_of_the_results(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.results_dir.mkdir(parents=True)
    monkeypatch.setattr(files.os, "access", lambda path, _: path == settings.results_dir)
    assert states(storage.check(Patient(settings=settings))) == {"disk": "ok"}, "as in a container, a volume of its own"


def logging_to(settings: Settings, folder: Path | None) -> list[Finding]:
    found = list(folders.logs(Patient(settings=settings.model_copy(update={"log_dir": folder}))))
    needs_a_remedy(found)
    return found


def test_logs_have_a_folder_with_room(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(logging_to(settings, None)) == {"logs": "skipped"}
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((folders.LOG_MAX, "ok"), (folders.LOG_MAX - 1, "warning"), (folders.FULL - 1, "problem")):
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert states(logging_to(settings, tmp_path / "made" / "by whoever logs")) == {"logs": state}
    assert not (tmp_path / "made").exists(), "it is only looked at"


def test_logs_that_may_not_be_written(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    assert "is no folder" in logging_to(settings, tmp_path / "a file")[0].says
    (tmp_path / "a link").symlink_to(tmp_path / "gone")
    assert "is no folder" in logging_to(settings, tmp_path / "a link")[0].says
    ours, foreign = tmp_path / "worker-0.log", tmp_path / "someone-elses.log"
    for path in (ours, foreign):
        path.touch()
    for denied, state in ((foreign, "ok"), (ours, "problem"), (tmp_path, "problem")):
        monkeypatch.setattr(folders.os, "access", lambda path, _, denied=denied: path != denied)
        (found,) = logging_to(settings, tmp_path)
        assert found.state == state and (state == "ok" or f"{denied} may not be written" in found.says)


def with_loras(settings: Settings, folder: Path | None) -> list[Finding]:
    found = list(folders.loras(Patient(settings=settings.model_copy(update={"lora_dir": folder}))))
    assert all(one.remedy for one in found[1:])
    return found


def test_loras_are_looked_into(settings: Settings, tmp_path: Path, checkpoint: Path) -> None:
    assert [one.state for one in with_loras(settings, None)] == ["skipped"]
    folder = tmp_path / "loras"
    (missing,) = with_loras(settings, folder)
    assert missing.state == "problem" and missing.remedy
    folder.mkdir()
    assert [one.state for one in with_loras(settings, folder)] == ["warning"], "there is none"
    shutil.copy(checkpoint / "transformer" / "a.safetensors", folder / "ink.safetensors")
    (fine,) = with_loras(settings, folder)
    assert (fine.state, fine.says) == ("ok", f"{folder}: 1 can be named by tasks")
    (folder / "cut.safetensors").write_bytes((folder / "ink.safetensors").read_bytes()[:-1])
    head = b'{"a":{"data_offsets":[0,Infinity]}}'
    (folder / "endless.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    (folder / "no name.safetensors").symlink_to("ink.safetensors")
    (folder / "outside.safetensors").symlink_to(checkpoint / "transformer" / "a.safetensors")
    first, *others = with_loras(settings, folder)
    assert (first.state, first.says) == ("ok", f"{folder}: 1 can be named by tasks")
    assert sorted((one.state, one.says.split(".safetensors")[0].rpartition("/")[2]) for one in others) == [
        ("problem", "cut"), ("problem", "endless"), ("warning", "no name"), ("warning", "outside"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as server:
        show_credentials(patch)
        yield server


def look_into(server: S3Server, **changes: str) -> list[Finding]:
    told = {"storage": "s3", "s3_url": f"s3://{BUCKET}/results", "s3_endpoint": server.endpoint} | changes
    found = list(storage.check(Patient(settings=load_settings(told))))
    needs_a_remedy(found)
    assert not [path for path in server.folder.rglob("*") if path.is_file()], "nothing is left behind"
    return found


def test_a_bucket_takes_a_picture_and_clients_fetch_it(bucket: S3Server) -> None:
    assert states(look_into(bucket)) == {"storage": "ok", "storage link": "ok"}
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert states(look_into(bucket, s3_public_endpoint=nowhere)) == {"storage": "ok", "storage link": "warning"}


def test_a_bucket_that_is_not_there_or_not_ours(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "404" in look_into(bucket, s3_url="s3://nothing")[0].says
    assert "Could not connect" in look_into(bucket, s3_endpoint=f"http://127.0.0.1:{free_port()}")[0].says
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert "403" in look_into(bucket)[0].says
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in look_into(bucket)[0].says
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    (found,) = storage.check(Patient(settings=load_settings({"storage": "s3", "s3_url": f"s3://{BUCKET}"})))
    assert (found.state, "nobody" in found.says) == ("problem", True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with one sound file and its checksums."""
    folder = tmp_path / "a model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    head = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    data = len(head).to_bytes(8, "little") + head + b"12345678"
    (folder / "transformer" / "a.safetensors").write_bytes(data)
    index = {"weight_map": {"w": "a.safetensors"}}
    (folder / "transformer" / "a.safetensors.index.json").write_text(json.dumps(index))
    sums = f"{hashlib.sha256(data).hexdigest()}  transformer/a.safetensors\n"
    (folder / files.SUMS).write_text(sums)
    return folder


def served(settings: Settings, folder: Path | str, **more: str) -> Patient:
    """A fleet that serves a model from this place."""
    models_file = settings.data_dir.parent / "models.toml"
    rows = {"source": str(folder), **more}
    models_file.write_text("[own]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in rows.items()))
    return Patient(settings=settings.model_copy(update={"models": ("own",), "models_file": models_file}))


def test_a_whole_model_is_fine(settings: Settings, checkpoint: Path) -> None:
    (found,) = files.models(served(settings, checkpoint))
    assert (found.check, found.state) == ("model own", "ok") and "1 of 1 checksums" in found.says


def test_the_model_that_ships_is_whole(patient: Patient) -> None:
    assert states(files.models(patient)) == {"model pico": "ok"}
    assert files.whole(pico.FOLDER, float("inf")) == (0, 0)


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "flipped",
        "no head",
        "no shard",
        "not listed",
        "no index",
        "huge head",
        "deep head",
        "odd head",
        "odd shards",
    ],
)  # fmt: skip
def test_a_damaged_model_is_a_problem(settings: Settings, checkpoint: Path, damage: str) -> None:
    weights = checkpoint / "transformer" / "a.safetensors"
    data = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(data[:-1])
    elif damage == "flipped":
        weights.write_bytes(data[:-1] + b"9")
    elif damage == "no head":
        weights.write_bytes(b"<html>not found</html>")
    elif damage == "huge head":
        weights.write_bytes(b"\xff" * 8 + data)
    elif damage == "deep head":
        weights.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    elif damage == "odd head":
        head = b'{"w": {"data_offsets": [0, "x"]}}'
        weights.write_bytes(len(head).to_bytes(8, "little") + head)
    elif damage == "odd shards":
        (checkpoint / "transformer" / "a.safetensors.index.json").write_text('["w"')
    elif damage == "no shard":
        (checkpoint / files.SUMS).unlink()
        weights.unlink()
    elif damage == "not listed":
        (checkpoint / "transformer" / "a.safetensors.index.json").unlink()
        weights.unlink()
    else:
        (checkpoint / "model_index.json").unlink()
    found = list(files.models(served(settings, checkpoint)))
    assert states(found) == {"model own": "problem"} and str(checkpoint) in found[0].says
    needs_a_remedy(found)


def test_a_gateways_image_has_no_pico(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: None)
    assert states(files.models(patient)) == {"model pico": "skipped"}


def test_a_model_that_is_not_here(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(files.models(served(settings, "/no/such folder"))) == {"model own": "problem"}
    monkeypatch.setattr(files, "_cached", lambda *_: Finding("", "warning", "is not on this machine"))
    assert states(files.models(served(settings, "a/b", revision="0" * 40))) == {"model own": "warning"}


def test_the_hubs_cache_is_read_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = files._cached("some/model", "0" * 40)
    assert isinstance(found, Finding) and found.state == "warning"
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert files._cached("some/model", "0" * 40) == snapshot


def test_files_of_the_hub_are_named_after_their_checksums(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    text = b"{}"
    for name in (hashlib.sha256(text).hexdigest(), hashlib.sha1(b"blob 2\0" + text).hexdigest()):
        (blobs / name).write_bytes(text)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file, blob in zip(("model_index.json", "config.json"), sorted(blobs.iterdir()), strict=True):
        (folder / file).symlink_to(blob)
    assert files.whole(folder, float("inf")) == (2, 2)
    assert files.whole(folder, time.monotonic()) == (2, 0), "no time is left"
    next(blobs.iterdir()).write_bytes(b"[]")
    with pytest.raises(files.Damaged, match="another checksum"):
        files.whole(folder, float("inf"))


# Redis


def test_redis_as_the_tests_have_it(patient: Patient) -> None:
    found = list(store.check(patient))
    expected = ["redis", "redis version", "redis AOF", "redis memory", "redis user", "redis clock"]
    assert [one.check for one in found] == expected
    assert set(states(found).values()) == {"ok"}


def test_redis_that_keeps_nothing_and_throws_away(tmp_path: Path) -> None:
    options = ["--appendonly", "no", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]
    with RedisServer(tmp_path, *options) as server:
        found = list(store.check(Patient(settings=load_settings({"redis_url": server.url}))))
    assert {check for check, state in states(found).items() if state == "problem"} == {"redis AOF", "redis memory"}
    needs_a_remedy(found)


def test_a_replica_is_no_place_to_write(redis_server: RedisServer, tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--replicaof", f"127.0.0.1 {redis_server.port}") as server:
        found = list(store.check(Patient(settings=load_settings({"redis_url": server.url}))))
    assert states(found)["redis"] == "problem"
    assert f"replica of 127.0.0.1:{redis_server.port}" in found[0].says and "primary" in found[0].remedy


def test_redis_that_is_away() -> None:
    settings = load_settings({"redis_url": f"redis://:secret@127.0.0.1:{free_port()}/0", "redis_patience_s": 0.2})
    (found,) = store.check(Patient(settings=settings))
    assert found.state == "problem" and "secret" not in found.says
    broken = Patient(settings=settings.model_copy(update={"redis_url": "http://x"}))
    assert states(store.check(broken)) == {"redis": "problem"}


@pytest.mark.parametrize("user", ["gateway", "worker", "operator"])
def test_users_of_least_rights_are_enough(tmp_path: Path, user: str) -> None:
    with GuardedRedis(tmp_path) as server:
        found = list(store.check(Patient(settings=load_settings({"redis_url": server.url_of(user)}))))
    assert set(states(found).values()) == {"ok"}, found
    (who,) = (one for one in found if one.check == "redis user")
    assert who.says.startswith(user)


def test_facts_without_a_refusal(broker: Broker) -> None:
    facts = broker.redis_facts()
    assert (facts.aof, facts.appendfsync, facts.policy, facts.user) == (True, "everysec", "noeviction", "default")
    assert abs(facts.clock_ahead_s) < 1


FINE = RedisFacts(
    version="7.0.15", aof=True, appendfsync="everysec", write_error="", maxmemory=0, used=1 << 20, policy="noeviction",
    user="gateway", primary="", clock_ahead_s=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "check", "state"),
    [
        ({"version": "6.0.9"}, "redis version", "problem"),
        ({"version": "6.2.0"}, "redis version", "ok"),
        ({"aof": False}, "redis AOF", "problem"),
        ({"write_error": "aof_last_write_status"}, "redis AOF", "problem"),
        ({"appendfsync": "no"}, "redis AOF", "warning"),
        ({"appendfsync": None}, "redis AOF", "ok"),
        ({"policy": "volatile-lru"}, "redis memory", "warning"),
        ({"policy": "volatile-lru", "maxmemory": 1 << 30}, "redis memory", "problem"),
        ({"maxmemory": 1 << 20}, "redis memory", "warning"),
    ],
    ids=str,
)
def test_how_redis_is_set_up_is_judged(changes: dict[str, Any], check: str, state: str) -> None:
    found = list(store.judge(FINE._replace(**changes)))
    assert states(found)[check] == state
    assert all(other == "ok" for name, other in states(found).items() if name != check)
    needs_a_remedy(found)


@pytest.mark.parametrize(
    ("user", "url", "state"),
    [
        ("gateway", "redis://gateway:x@far:6379/0", "ok"),
        (None, "redis://gateway:x@far:6379/0", "ok"),
        ("default", "redis://127.0.0.1:6379/0", "ok"),
        ("default", "redis://localhost:6379/0", "ok"),
        ("default", "unix:///run/redis.sock", "ok"),
        ("default", "redis://:x@far:6379/0", "warning"),
        ("default", "redis://far:6379/0", "problem"),
    ],
)
def test_a_fleet_has_users_of_its_own(user: str | None, url: str, state: str) -> None:
    found = store.user(FINE._replace(user=user), load_settings({"redis_url": url}))
    assert found.state == state
    needs_a_remedy([found])


@pytest.mark.parametrize(("ahead_s", "state"), [(0.4, "ok"), (-3.0, "warning"), (60.0, "problem"), (-60.0, "problem")])
def test_clocks_agree(ahead_s: float, state: str) -> None:
    found = store.clock("redis clock", ahead_s)
    assert found.state == state
    assert state == "ok" or ("ahead of" if ahead_s > 0 else "behind") in found.says
    needs_a_remedy([found])


# The gateway, its templates, Nginx


HEALTH = {
    "status": "healthy", "reasons": [], "uptime_seconds": 1.0, "gpu_memory_used_mb": 0, "pending_tasks": 0,
    "models_loaded": [], "workers": 1,
}  # fmt: skip
QUEUES = Reply(body={"queues": []})


def look(stub: StubGateway) -> list[Finding]:
    return list(edge.gateway(Patient(settings=load_settings({"url": stub.url}))))


def test_a_healthy_gateway() -> None:
    with StubGateway(Reply(body=HEALTH), QUEUES, Reply(body=HEALTH)) as stub:
        assert states(look(stub)) == {"gateway": "ok", "api key": "ok", "gateway clock": "ok"}


@pytest.mark.parametrize(("status", "state"), [("degraded", "warning"), ("unhealthy", "problem")])
def test_an_ill_gateway_says_why(status: str, state: str) -> None:
    ill = Reply(body=HEALTH | {"status": status, "reasons": ["no worker is alive"]})
    with StubGateway(ill, QUEUES, ill) as stub:
        found = look(stub)[0]
    assert found.state == state and "no worker is alive" in found.says and found.remedy


def test_a_key_that_opens_nothing() -> None:
    with StubGateway(Reply(body=HEALTH), problem(401, "unauthenticated"), Reply(body=HEALTH)) as stub:
        found = {one.check: one for one in look(stub)}
    assert found["api key"].state == "problem" and "zfleet keys create" in found["api key"].says


@pytest.mark.parametrize(("late_s", "state"), [(0, "ok"), (0.9, "ok"), (-5, "warning"), (300, "problem")])
def test_the_gateways_clock_agrees(late_s: float, state: str) -> None:
    now = datetime(2026, 11, 26, tzinfo=UTC)
    assert edge.dated(format_datetime(now, usegmt=True), now.timestamp() + late_s).state == state
    assert edge.dated("yesterday", 0.0).state == "skipped"


def test_no_gateway() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert states(edge.gateway(Patient(settings=load_settings({"url": url})))) == {"gateway": "problem"}
    unset = load_settings({}).model_copy(update={"url": url})
    unset.model_fields_set.discard("url")
    assert states(edge.gateway(Patient(settings=unset))) == {"gateway": "warning"}, "a worker's host needs none"


def test_templates_are_read(settings: Settings, tmp_path: Path) -> None:
    assert states(edge.templates(Patient(settings=settings))) == {"templates": "ok"}
    (tmp_path / "bad.toml").write_text("model = ")
    bad = Patient(settings=settings.model_copy(update={"templates_dir": tmp_path}))
    (found,) = examine(bad, {"templates": edge.templates})
    assert found.state == "problem" and "bad.toml:1" in found.says


def test_nginx_looks_at_what_was_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "nginx.conf"
    results = tmp_path / "results"
    results.mkdir()
    config.write_text(
        load_render().render(
            gateways="127.0.0.1:8080", results_dir=results, run_dir=tmp_path, listen=f"127.0.0.1:{free_port()}"
        )
    )
    settings = load_settings({})
    patient = Patient(settings=settings, nginx_config=config)
    (fine,) = edge.nginx(patient)
    assert fine.state == "ok", fine
    config.write_text(config.read_text().replace("http {", "htp {", 1))
    (found,) = edge.nginx(patient)
    assert found.state == "problem" and "htp" in found.says and found.remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(edge.nginx(patient)) == {"nginx": "skipped"}
    assert states(edge.nginx(Patient(settings=settings))) == {"nginx": "skipped"}


def test_traces_reach_their_collector(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(edge.traces(patient)) == {"traces": "skipped"}
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.environment["OTEL_EXPORTER_OTLP_ENDPOINT"])
        assert states(edge.traces(patient)) == {"traces": "ok"}
        assert collector.spans == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert states(edge.traces(patient)) == {"traces": "warning"}
    monkeypatch.setitem(sys.modules, "common.spans", None)
    monkeypatch.delattr(common, "spans")
    assert states(edge.traces(patient)) == {"traces": "problem"}


# All of it


def test_a_check_that_hangs_or_breaks_is_a_problem_of_its_own(patient: Patient) -> None:
    def hangs(_: Patient) -> Iterable[Finding]:
        time.sleep(5)
        return []

    def breaks(_: Patient) -> Iterable[Finding]:
        raise ValueError("odd")

    def refuses(_: Patient) -> Iterable[Finding]:
        raise ConfigurationError("a clear word")

    began = time.monotonic()
    found = list(examine(patient, {"a": hangs, "b": breaks, "c": refuses}, limit_s=0.2))
    assert time.monotonic() - began < 4
    assert [(one.check, one.state) for one in found] == [("a", "problem"), ("b", "problem"), ("c", "problem")]
    assert "0.2 s" in found[0].says and "ValueError: odd" in found[1].says and found[2].says == "a clear word"


@contextlib.contextmanager
def _environment(monkeypatch: pytest.MonkeyPatch, **settings: str) -> Any:
    for name, value in settings.items():
        monkeypatch.setenv(f"ZFLEET_{name.upper()}", value)
    yield


def test_the_exit_code_says_it_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Settings
) -> None:
    monkeypatch.setattr(compute, "PROBE", 'import json; print(json.dumps({"cuda": None, "devices": 0}))')
    own = {"redis_url": settings.redis_url, "models": "pico", "data_dir": str(settings.data_dir)}
    with StubGateway(Reply(body=HEALTH), QUEUES, Reply(body=HEALTH)) as stub, _environment(monkeypatch, **own):
        assert cli.main(["doctor", "--url", stub.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "skipped") for line in lines)
    away = own | {"redis_url": f"redis://127.0.0.1:{free_port()}/0", "redis_patience_s": "0.2"}
    with _environment(monkeypatch, **away):
        assert cli.main(["doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in rows if row["state"] == "problem"] == ["redis"]
    assert {"check", "state", "says", "remedy"} == set(rows[0])
