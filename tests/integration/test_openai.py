"""OpenAI's own client against the whole fleet: Nginx, gunicorn, Redis, workers. Only its base URL is changed."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from openai import AsyncOpenAI, OpenAI
from openai.types import Image as OpenAIImage
from PIL import Image

from common.broker import Broker
from common.schemas import TaskRecord
from common.settings import Settings, load_settings
from tests.fleet import await_final, ready_workers, record
from tests.integration.nginx_edge import nginx
from tests.samples import drawn, encoded
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually
from tests.tenants import new_key
from worker.pico.judge import judge
from worker.pico.scenes import Scene, Thing

CIRCLE = Scene((Thing("circle", "red"),), "grey")
NOBODYS = "turbo"  # a model that no worker here serves, so that its tasks wait


@dataclass(frozen=True)
class Fleet:
    """A running fleet with keys of two tenants, as their clients and its operator see it."""

    url: str
    broker: Broker
    served: Settings
    key: str
    other: str

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0} | options)

    def tasks(self) -> list[str]:
        found, _ = self.broker.tasks("acme", status=None, limit=200, before=None)
        return [task.task_id for task in found]

    def newest(self) -> TaskRecord:
        return record(self.broker, self.tasks()[0])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    base = tmp_path_factory.mktemp("openai")
    with RedisServer(base) as redis:
        flags = {
            "redis_url": redis.url, "data_dir": base / "data", "models": ("pico", "simulated"), "devices": "cpu",
            "prewarm": ("pico", "simulated"), "simulated_image_ms": 100.0, "beat_s": 0.5, "cpu_threads": 1,
        }  # fmt: skip
        settings = load_settings(flags)
        served = load_settings(
            flags | {"models": ("pico", "simulated", NOBODYS), "model_aliases": ("gpt-image-2=simulated",)}
        )
        broker = Broker(settings)
        keys = [new_key(broker, tenant) for tenant in ("acme", "other")]
        with (
            GatewayServer(served, base / "gateway.out") as gateway,
            WorkerServer(settings, base / "worker.out"),
            nginx(base / "edge", gateway.port) as edge,
        ):
            ready_workers(broker, within_s=120)
            yield Fleet(edge.url, broker, served, *keys)
        broker.close()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[OpenAI]:
    with fleet.client() as client:
        yield client


def opened(image: OpenAIImage) -> Image.Image:
    assert image.b64_json is not None and image.url is None
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def test_a_prompt_becomes_a_picture(fleet: Fleet, client: OpenAI) -> None:
    made = client.images.generate(prompt="a red circle on a grey background", size="128x128", extra_body={"seed": 7})
    assert made.data is not None
    picture = opened(made.data[0])
    assert (picture.format, picture.size, made.size, made.output_format) == ("PNG", (128, 128), "128x128", "png")
    assert judge(np.asarray(picture.convert("RGB")), CIRCLE).matches
    task = fleet.newest()
    assert (task.request.seed, task.request.model) == (7, "pico")
    assert task.finished_at is not None and made.created == int(task.finished_at.timestamp())
    assert made.usage is not None and made.usage.output_tokens == 64


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_by_links_that_need_no_key(fleet: Fleet, client: OpenAI, kind: Any) -> None:
    made = client.images.generate(
        prompt="x", model="gpt-image-2", n=2, response_format="url", output_format=kind, size="64x64"
    )
    urls = [image.url or "" for image in made.data or ()]
    assert len(set(urls)) == 2 and all(url.startswith(f"{fleet.url}/view/") for url in urls)
    for url in urls:
        answer = requests.get(url, timeout=10)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, f"image/{kind}")
        assert Image.open(io.BytesIO(answer.content)).format == kind.upper()
        assert requests.get(url.partition("?")[0], timeout=10).status_code == 401
        assert requests.get(url[:-1] + "g", timeout=10).status_code == 404


def test_a_stream_shows_the_picture_on_its_way(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt="x", model="pico", stream=True, partial_images=2, size="128x64", output_format="webp",
        extra_body={"steps": 40},
    )  # fmt: skip
    *partial, completed = list(stream)
    assert completed.type == "image_generation.completed"
    assert Image.open(io.BytesIO(base64.b64decode(completed.b64_json))).size == (128, 64)
    assert 1 <= len(partial) <= 2
    for index, event in enumerate(partial):
        assert event.type == "image_generation.partial_image" and event.partial_image_index == index
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format == "WEBP" == event.output_format.upper()


def test_a_mask_says_where_a_picture_is_edited(client: OpenAI) -> None:
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    made = client.images.edit(
        image=("in.png", encoded(image)), mask=("mask.png", encoded(mask)), prompt="a big red square", model="pico"
    )
    assert made.data is not None
    changed = np.abs(np.asarray(opened(made.data[0]).convert("RGB")).astype(int) - np.asarray(image)).mean(axis=2)
    assert changed[:, 40:].mean() * 2 < changed[:, :24].mean()


def test_edits_of_one_and_of_several_pictures(fleet: Fleet, client: OpenAI) -> None:
    hook = {"metadata": {"k": "v"}, "seed": 3, "steps": 4}
    client.images.edit(image=[encoded(), encoded(drawn(32, 32))], prompt="x", model="simulated", extra_body=hook)
    task = fleet.newest().request
    assert (len(task.reference_images), task.metadata, task.seed, task.steps) == (2, {"k": "v"}, 3, 4)
    picture = encoded(drawn(96, 64))
    stream = client.images.edit(image=picture, prompt="x", model="pico", stream=True, user="u1")
    assert [event.type for event in stream] == ["image_edit.completed"]
    task = fleet.newest().request
    assert task.init_image and (task.width, task.height, task.metadata) == (96, 64, {"user": "u1"})


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pico", "simulated", NOBODYS, "gpt-image-2"]
    assert client.models.retrieve("gpt-image-2").owned_by == "zfleet"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_errors_are_the_clients_own(fleet: Fleet, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="choose one of: pico, simulated, turbo") as unknown:
        client.images.generate(prompt="x", model="dall-e-3")
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="x", size="100x100")
    assert bad.value.param == "size" and bad.value.request_id
    with pytest.raises(openai.AuthenticationError) as refused:
        fleet.client(api_key="sk-none").images.generate(prompt="x")
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="pico", messages=[])
    with pytest.raises(openai.BadRequestError) as file:
        client.images.edit(image=b"no picture", prompt="x")
    assert file.value.param == "image"


def test_an_error_in_mid_stream_is_raised(fleet: Fleet, client: OpenAI) -> None:
    stream = client.images.generate(prompt="x", model=NOBODYS, stream=True)
    fleet.broker.cancel(fleet.tasks()[0], "acme")
    with pytest.raises(openai.APIError, match="was canceled") as canceled:
        list(stream)
    assert canceled.value.code == "task_canceled"


def test_twenty_at_once_by_the_async_client(fleet: Fleet) -> None:
    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=fleet.key) as client:
            calls = [
                client.images.with_raw_response.generate(prompt=f"x {i}", model="simulated", size="32x32")
                for i in range(20)
            ]
            answers = await asyncio.gather(*calls)
            assert all(opened(answer.parse().data[0]).size == (32, 32) for answer in answers)  # type: ignore[index]
            return [answer.headers["x-task-id"] for answer in answers]

    with ThreadPoolExecutor(1) as apart:  # from the loop that a browser may have in this thread, from tests before
        assert len(set(apart.submit(asyncio.run, all_of_them()).result())) == 20


def test_a_client_that_would_give_up_is_told_first_and_repeats_nothing(fleet: Fleet) -> None:
    before = len(fleet.tasks())
    with fleet.client(timeout=1.0, max_retries=2) as client, pytest.raises(openai.InternalServerError) as late:
        client.images.generate(prompt="x", model=NOBODYS)
    task_id = late.value.response.headers["x-task-id"]
    assert late.value.code == "task_unfinished" and task_id in late.value.message
    assert fleet.tasks()[: len(fleet.tasks()) - before] == [task_id]
    assert record(fleet.broker, task_id).status == "queued"


def test_with_an_idempotency_key_it_repeats_and_finds_its_task(fleet: Fleet) -> None:
    before, key = len(fleet.tasks()), {"Idempotency-Key": "mine"}
    with fleet.client(timeout=0.5, max_retries=1) as client, pytest.raises(openai.InternalServerError) as late:
        client.images.generate(prompt="x", model=NOBODYS, extra_headers=key)
    assert late.value.response.request.headers["x-stainless-retry-count"] == "1"
    assert len(fleet.tasks()) == before + 1
    with fleet.client(max_retries=1) as client, pytest.raises(openai.ConflictError, match="Idempotency-Key"):
        client.images.generate(prompt="another", model=NOBODYS, extra_headers=key)


def test_whoever_hangs_up_finds_the_picture_later(fleet: Fleet, client: OpenAI) -> None:
    create = client.images.with_streaming_response.generate
    with create(prompt="x", model="simulated", stream=True, size="64x64") as answer:
        task_id = answer.headers["x-task-id"]  # there before anything is painted
    (task,) = await_final(fleet.broker, [task_id])
    assert task.status == "succeeded"
    headers = {"Authorization": f"Bearer {fleet.key}"}
    answer_later = requests.get(f"{fleet.url}/view/{task_id}/0.png", headers=headers, timeout=10)
    assert Image.open(io.BytesIO(answer_later.content)).size == (64, 64)
    assert requests.get(f"{fleet.url}/view/{task_id}/0.png", headers={"X-API-Key": fleet.other}, timeout=10).json()[
        "code"
    ] == "unknown_task"  # fmt: skip


def test_a_gateway_that_dies_under_a_call_makes_no_second_task(fleet: Fleet, tmp_path: Path) -> None:
    before, calls = len(fleet.tasks()), []
    with GatewayServer(fleet.served, tmp_path / "gateway.out") as gateway, nginx(tmp_path, gateway.port) as edge:

        def die() -> None:
            eventually(lambda: len(fleet.tasks()) > before)
            gateway.kill()

        count = openai.DefaultHttpxClient(event_hooks={"request": [calls.append]})
        eventually(lambda: requests.get(f"{edge.url}/health", timeout=5).ok, within_s=30)
        threading.Thread(target=die).start()
        with (
            fleet.client(base_url=f"{edge.url}/v1", max_retries=2, http_client=count) as client,
            pytest.raises(openai.InternalServerError, match="502"),
        ):
            client.images.generate(prompt="x", model=NOBODYS)
    assert (len(calls), len(fleet.tasks())) == (1, before + 1)
