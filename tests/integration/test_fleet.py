"""A prompt goes in over REST at one end and comes out as a picture at the other: Nginx, gunicorn, Redis, pico."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from common.broker import Broker
from common.settings import Settings
from tests.fleet import ready_workers
from tests.integration.nginx_edge import nginx
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually
from worker import pico
from worker.pico import captions, evaluate
from worker.pico.judge import judge

LIMIT = 128  # tokens that pico reads
SAMPLE = 24  # prompts of the evaluation


@dataclass(frozen=True)
class Fleet:
    """A running fleet, as a client sees it and as its operator does."""

    url: str
    settings: Settings
    logs: Path

    def post(self, path: str, body: object) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=70)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=70, allow_redirects=False)

    def finished(self, task_id: str) -> dict[str, Any]:
        view: dict[str, Any] = self.get(f"/api/status/{task_id}?wait=60").json()
        return view

    def pixels(self, image: dict[str, Any]) -> NDArray[np.int16]:
        """Fetch a picture; (height, width, 3)."""
        return np.asarray(Image.open(io.BytesIO(self.get(image["url"]).content)).convert("RGB")).astype(np.int16)

    def make(self, **fields: object) -> dict[str, Any]:
        """Submit, wait, and return the status."""
        answer = self.post("/api/submit", fields)
        assert answer.status_code == 202, answer.text
        return self.finished(answer.json()["task_id"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet for this module: real parts only. Paths have spaces in them."""
    base = tmp_path_factory.mktemp("the fleet")
    (base / "redis data").mkdir()
    results = base / "edge run" / "results of the fleet"  # where the Nginx of these tests looks
    with RedisServer(base / "redis data") as redis_server:
        settings = Settings(
            redis_url=redis_server.url,
            data_dir=results.parent,
            models=("pico", "simulated"),
            devices="cpu",
            simulated_image_ms=40.0,
            x_accel="/_results/",
            log_dir=base / "logs",
        )
        with (
            GatewayServer(settings, base / "gateway.out") as gateway,
            nginx(results.parent, gateway.port) as edge,
        ):
            shutil.rmtree(results)
            (results.parent / "results").symlink_to(results.name)  # Nginx's folder is the storage's folder
            results.mkdir()
            with WorkerServer(settings, base / "worker.out"):
                ready_workers(Broker(settings), within_s=120)
                eventually(lambda: requests.get(edge.url + "/ready", timeout=5).status_code == 200, within_s=30)
                yield Fleet(edge.url, settings, base / "logs")


def test_a_prompt_becomes_a_picture(fleet: Fleet) -> None:
    answer = fleet.post("/api/submit", {"prompt": "a red circle on a grey background", "seed": 7, "width": 96})
    assert answer.status_code == 202
    submitted = answer.json()
    assert answer.headers["Location"].endswith(submitted["status_url"])
    view = fleet.finished(submitted["task_id"])
    assert (view["status"], view["model"], view["progress"]) == (
        "succeeded",
        "pico",
        {"step": 8, "steps": 8, "preview": None},
    )
    assert [attempt["outcome"] for attempt in view["attempts"]] == ["succeeded"]
    (image,) = view["images"]
    picture = fleet.get(image["url"])
    assert (picture.status_code, picture.headers["Content-Type"]) == (200, "image/webp")
    assert (len(picture.content), hashlib.sha256(picture.content).hexdigest()) == (image["bytes"], image["sha256"])
    assert Image.open(io.BytesIO(picture.content)).size == (96, 128) == (image["width"], image["height"])
    timings = view["timings"]
    spent = sum(timings[stage] for stage in ("queued_ms", "encode_ms", "denoise_ms", "decode_ms", "store_ms"))
    assert 0 < spent <= timings["total_ms"] + 60
    assert all(timings[stage] > 0 for stage in ("encode_ms", "denoise_ms", "decode_ms", "store_ms", "total_ms"))


def test_the_same_seed_is_the_same_picture_and_n_counts_up(fleet: Fleet) -> None:
    wanted = {"prompt": "绿色方形", "width": 64, "height": 64, "steps": 2, "format": "png"}
    three = fleet.make(**wanted, seed=5, n=3)
    alone = fleet.make(**wanted, seed=6)
    assert [image["seed"] for image in three["images"]] == [5, 6, 7]
    assert len({image["sha256"] for image in three["images"]}) == 3
    # within a batch float sums are added in another order, which may tip a rounding
    difference = fleet.pixels(alone["images"][0]) - fleet.pixels(three["images"][1])
    assert np.abs(difference).max() <= 1


def test_many_sizes_and_lengths_at_once_each_get_their_own(fleet: Fleet) -> None:
    shapes = [(64, 64, 2), (96, 64, 5), (64, 128, 3), (128, 128, 1), (80, 112, 4), (64, 64, 6)]
    ids = {}
    for seed, (width, height, steps) in enumerate(shapes):
        body = {"prompt": f"shape {seed}", "width": width, "height": height, "steps": steps, "seed": seed}
        ids[fleet.post("/api/submit", body).json()["task_id"]] = (width, height, steps, seed)
    for task_id, (width, height, steps, seed) in ids.items():
        view = fleet.finished(task_id)
        assert view["status"] == "succeeded", view["error"]
        assert (view["progress"]["step"], view["images"][0]["seed"]) == (steps, seed)
        picture = fleet.get(view["images"][0]["url"])
        assert Image.open(io.BytesIO(picture.content)).size == (width, height)


def test_every_picture_of_a_mixed_batch_shows_its_own_prompt(fleet: Fleet) -> None:
    """A fixed sample of the evaluation in many sizes: each picture is the one that its prompt gives alone, and shows
    its background, colours and places; outlines too, but for the smallest pictures.
    """
    sizes = [(128, 128), (64, 96), (96, 128), (128, 96), (192, 128), (112, 160)]
    prompts = captions.held_out(SAMPLE)
    ids = []
    for seed, prompt in enumerate(prompts):
        width, height = sizes[seed % len(sizes)]
        body = {"prompt": prompt.text, "width": width, "height": height, "seed": seed, "format": "png"}
        ids.append(fleet.post("/api/submit", body).json()["task_id"])
    views = [fleet.finished(task_id) for task_id in ids]
    assert {view["status"] for view in views} == {"succeeded"}
    assert held_together(views) >= SAMPLE / 2, "the worker held them at the same time"

    pictures = [fleet.pixels(view["images"][0]) for view in views]
    stock = evaluate.load(pico.FOLDER)
    for seed, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        alone = evaluate.paint(stock, [prompt.text], sizes[seed % len(sizes)], first_seed=seed)[0]
        assert np.abs(picture - alone).max() <= 1, prompt  # a rounding may tip: floats are summed in another order
    same_size = zip(pictures, pictures[len(sizes) :], strict=False)
    assert all(np.abs(one - other).mean() > 5 for one, other in same_size), "a mix-up would be seen"

    found = [judge(each.astype(np.uint8), prompt.scene) for each, prompt in zip(pictures, prompts, strict=True)]
    assert [prompt.text for prompt, judged in zip(prompts, found, strict=True) if not judged.matches] == []
    large = [judged for seed, judged in enumerate(found) if min(sizes[seed % len(sizes)]) >= 96]
    shapes = [shape for judged in large for shape in judged.shapes]
    assert sum(shapes) >= evaluate.GOALS["shape"] * len(shapes)


def test_guided_and_plain_pictures_share_a_batch_and_each_shows_its_prompt(fleet: Fleet) -> None:
    prompts = [prompt for prompt in captions.held_out(4, seed=2) for _ in (False, True)]
    negatives = [f"a star on a {prompt.scene.background or 'white'} background" for prompt in prompts]
    ids = []
    for index, prompt in enumerate(prompts):
        guidance = {"guidance_scale": 2.0, "negative_prompt": negatives[index]} if index % 2 else {}
        body = {"prompt": prompt.text, "seed": index // 2, "format": "png"} | guidance
        ids.append(fleet.post("/api/submit", body).json()["task_id"])
    views = [fleet.finished(task_id) for task_id in ids]
    assert held_together(views) >= len(prompts) / 2, "the worker held them at the same time"
    pictures = [fleet.pixels(view["images"][0]) for view in views]
    for prompt, picture in zip(prompts, pictures, strict=True):
        assert judge(picture.astype(np.uint8), prompt.scene).matches, prompt.text
    stock = evaluate.load(pico.FOLDER)
    for index, (plain, guided) in enumerate(zip(pictures[::2], pictures[1::2], strict=True)):
        texts, negative = [prompts[2 * index].text], [negatives[2 * index]]
        alone = evaluate.paint(stock, texts, (128, 128), index, guidance_scale=2.0, negative_prompt=negative)[0]
        assert np.abs(guided - alone).max() <= 1
        assert np.abs(guided - plain).max() > 1, "guidance did nothing"


def held_together(views: list[dict[str, Any]]) -> int:
    """Return how many of the tasks began before the one before them had ended."""
    spans = sorted((view["started_at"], view["finished_at"]) for view in views)
    return sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))


@pytest.mark.parametrize(
    "text", ["画一个红色的圆形，", "нарисуй красный круг ", "🎨🟥 ", "ارسم دائرة حمراء ", "a red circle "]
)
def test_a_long_prompt_is_cut_with_a_warning_in_any_language(fleet: Fleet, text: str) -> None:
    prompt = (text * (16_000 // len(text) + 1))[:16_000]
    view = fleet.make(prompt=prompt, width=64, height=64, steps=1)
    assert view["status"] == "succeeded", view["error"]
    assert len(view["warnings"]) == 1
    assert str(LIMIT) in view["warnings"][0]


@pytest.mark.parametrize("image_format", ["webp", "png", "jpeg"])
def test_formats(fleet: Fleet, image_format: str) -> None:
    view = fleet.make(prompt="x", model="simulated", format=image_format, quality=50)
    url = view["images"][0]["url"]
    assert url.endswith(f"/0.{image_format}")
    picture = fleet.get(url)
    assert picture.headers["Content-Type"] == f"image/{image_format}"
    assert (Image.open(io.BytesIO(picture.content)).format or "").lower() == image_format


def test_a_refused_request_makes_no_task(fleet: Fleet) -> None:
    before = len(fleet.get("/api/tasks?limit=200").json()["tasks"])
    answer = fleet.post("/api/submit", {"prompt": " ", "width": 100, "colour": "red"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/problem+json")
    assert len(fleet.get("/api/tasks?limit=200").json()["tasks"]) == before


@pytest.mark.parametrize(
    "path", ["/view/{id}/../0.webp", "/view/{id}/%2e%2e/0.webp", "/view/{id}/1.webp", "/view/{id}/0.png"]
)
def test_only_a_tasks_own_pictures_are_shown(fleet: Fleet, path: str) -> None:
    view = fleet.make(prompt="x", model="simulated")
    answer = fleet.get(path.format(id=view["task_id"]))
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")


def test_what_the_operator_sees(fleet: Fleet) -> None:
    for model in ("pico", "simulated"):
        fleet.make(prompt="x", model=model)
    health = fleet.get("/health").json()
    assert (health["status"], health["workers"], health["models_loaded"]) == ("healthy", 1, ["pico", "simulated"])
    (worker,) = fleet.get("/api/workers").json()["workers"]
    assert (worker["device"], worker["models"], worker["gpu"]) == ("cpu", ["pico", "simulated"], None)
    names = {queue["name"] for queue in fleet.get("/api/queue").json()["queues"]}
    assert "simulated.normal.default" in names
    assert [model["name"] for model in fleet.get("/api/models").json()["models"]] == ["pico", "simulated"]


def test_one_request_id_leads_from_nginx_to_the_worker_and_no_log_holds_a_prompt(fleet: Fleet) -> None:
    secret = "unmistakable secret prompt 独一无二"
    body = {"prompt": secret, "model": "simulated"}
    headers = {"X-Request-ID": "trace-me-42"}
    answer = requests.post(fleet.url + "/api/submit", json=body, headers=headers, timeout=10)
    assert answer.headers["X-Request-ID"] == "trace-me-42"
    task_id = answer.json()["task_id"]
    fleet.finished(task_id)

    def told() -> bool:
        text = "".join(path.read_text("utf-8") for path in fleet.logs.glob("*.log"))
        assert secret not in text and "独一无二" not in text
        lines = [json.loads(line) for line in text.splitlines()]
        mine = {line["role"] for line in lines if line.get("request_id") == "trace-me-42"}
        return mine == {"gateway", "worker"} and any(line.get("task_id") == task_id for line in lines)

    eventually(told)
