"""What an operator gives a worker, as clients meet it: a folder of LoRAs, little memory, room for one model."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from common.broker import Broker
from common.settings import Settings
from tests.fleet import ready_workers
from tests.integration.test_fleet import Fleet
from tests.integration.zfleet_command import environment, zfleet
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually
from tests.unit.worker.zimage.lorafiles import write_lora

LIMIT_MB = 36  # of which pico's weights take most
STAR = {"prompt": "a yellow star on a blue background", "model": "pico", "format": "png", "seed": 7}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet for this module: a gateway, and a worker that serves two models and keeps one."""
    base = tmp_path_factory.mktemp("limits")
    for name in ("redis", "loras"):
        (base / name).mkdir()
    write_lora(base / "loras" / "ink.safetensors")
    with RedisServer(base / "redis") as redis_server:
        settings = Settings(
            redis_url=redis_server.url,
            data_dir=base / "data",
            models=("pico", "simulated"),
            devices="cpu",
            cpu_threads=1,  # as other tests run beside this
            simulated_image_ms=40.0,
            simulated_load_ms=100.0,
            lora_dir=base / "loras",
            memory_limit_mb=LIMIT_MB,
            max_resident=1,
            resident_wait_s=0.5,
            beat_s=0.5,
            log_dir=base / "logs",
        )
        with GatewayServer(settings, base / "g") as gateway, WorkerServer(settings, base / "w"):
            ready_workers(Broker(settings), within_s=120)
            eventually(lambda: requests.get(gateway.url + "/ready", timeout=5).ok, within_s=30)
            yield Fleet(gateway.url, settings, base / "logs")


def refused(answer: requests.Response) -> dict[str, str]:
    """The fields that an answer refuses."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/problem+json"), answer.text
    return {error["loc"]: error["msg"] for error in answer.json()["errors"]}


def shown(url: str) -> tuple[int, int]:
    """The size of a preview in pixels."""
    head, _, data = url.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def loras_of_pico(fleet: Fleet) -> list[str]:
    models = fleet.get("/api/models").json()["models"]
    found: list[str] = next(model["loras"] for model in models if model["name"] == "pico")
    return found


def events(fleet: Fleet, task_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's events to their end."""
    with requests.get(f"{fleet.url}/api/tasks/{task_id}/events", stream=True, timeout=60) as answer:
        name = ""
        for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


# LoRAs


def test_a_lora_of_the_workers_folder_changes_the_picture_and_no_other(fleet: Fleet) -> None:
    plain, one, two, after = (
        fleet.make(**STAR, loras=loras) for loras in ([], [{"name": "ink"}], [{"name": "ink"}], [])
    )
    assert one["status"] == "succeeded", one["error"]
    assert one["request"]["loras"] == [{"name": "ink", "scale": 1.0}]
    assert np.abs(fleet.pixels(one["images"][0]) - fleet.pixels(plain["images"][0])).mean() > 5
    assert one["images"][0]["sha256"] == two["images"][0]["sha256"]
    assert plain["images"][0]["sha256"] == after["images"][0]["sha256"]


def test_the_loras_that_there_are_can_be_seen_and_others_are_refused(fleet: Fleet) -> None:
    def submit(*names: str) -> requests.Response:
        return fleet.post("/api/submit", STAR | {"loras": [{"name": name} for name in names]})

    eventually(lambda: loras_of_pico(fleet) == ["ink"])
    eventually(lambda: not submit("ink", "oil").ok, every_s=0.5)  # a submit goes by the last two seconds
    assert refused(submit("ink", "oil")) == {"loras": "no live worker has oil; there are: ink"}
    folder = fleet.settings.lora_dir
    assert folder is not None
    shutil.copy(folder / "ink.safetensors", folder / "oil.safetensors")
    eventually(lambda: loras_of_pico(fleet) == ["ink", "oil"])
    eventually(lambda: submit("oil").ok, every_s=0.5)
    assert fleet.make(**STAR, loras=[{"name": "oil"}])["status"] == "succeeded"


# Previews


def test_previews_come_with_the_events_and_are_gone_at_the_end(fleet: Fleet) -> None:
    task_id = fleet.post("/api/submit", STAR | {"steps": 30, "preview": True}).json()["task_id"]
    heard = list(events(fleet, task_id))
    name, last = heard[-1]
    assert (name, last["progress"]) == ("succeeded", {"step": 30, "steps": 30, "preview": None})
    steps = [data["preview"] for name, data in heard if name == "progress" and data["preview"]]
    states = [data["progress"]["preview"] for name, data in heard if name != "progress" and data["progress"]["preview"]]
    assert len(set(steps)) == len(steps)
    assert {shown(preview) for preview in [*steps, *states]} == {(16, 16)}


def test_the_command_line_keeps_the_newest_preview(fleet: Fleet, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("x.png", "p.webp")]
    line = ["generate", "a red circle", "--steps", "50", "-o", files[0], "--preview", files[1]]
    done = zfleet(*line, env=environment(url=fleet.url))
    assert done.returncode == 0, done.stderr
    assert Image.open(files[1]).format == "WEBP"


# Memory


def test_a_picture_that_no_worker_has_memory_for_is_refused_and_a_smaller_one_is_made(fleet: Fleet) -> None:
    (worker,) = fleet.get("/api/workers").json()["workers"]
    most = worker["max_pixels"]["pico"]
    assert 64 * 64 <= most < 256 * 256
    told = refused(fleet.post("/api/submit", STAR | {"width": 256, "height": 256}))
    assert told == {
        "width": f"width x height must be at most {most} pixels: no live worker of model pico has memory for more"
    }
    side = int(most**0.5) // 16 * 16
    view = fleet.make(**STAR, width=side, height=side)
    assert (view["status"], view["images"][0]["width"]) == ("succeeded", side), view["error"]


# Models


def test_two_models_take_turns_where_there_is_room_for_one(fleet: Fleet) -> None:
    fleet.make(prompt="x", model="simulated")
    views = [fleet.make(**STAR | {"model": model}) for model in ("pico", "pico", "simulated")]
    assert [view["status"] for view in views] == ["succeeded"] * 3
    first, second, other = (view["timings"]["load_ms"] for view in views)
    assert first > 0 and second == 0 and other >= fleet.settings.simulated_load_ms
    eventually(lambda: fleet.get("/health").json()["models_loaded"] == ["simulated"])


def test_tasks_for_both_models_at_once_are_all_made(fleet: Fleet) -> None:
    bodies = [STAR | {"model": model, "steps": 2} for model in ("pico", "simulated") * 3]
    ids = [fleet.post("/api/submit", body).json()["task_id"] for body in bodies]
    views = [fleet.finished(task_id) for task_id in ids]
    assert {view["status"] for view in views} == {"succeeded"}
    assert len([view for view in views if view["timings"]["load_ms"]]) < len(views), "those of one model go together"
