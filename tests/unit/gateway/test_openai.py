"""The OpenAI dialect without its client: what a call asks of the fleet, and what it answers."""

from __future__ import annotations

import base64
import threading
import time
from typing import Any

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from common.records import Claimed
from common.schemas import GenerateRequest, TaskRecord
from common.settings import Settings
from common.storage import open_storage
from gateway import outcome
from gateway.app import TASKS, close, create_app
from gateway.dialects import openai
from gateway.dialects._openai_fields import Asked, ImageEdit, ImageGeneration
from gateway.dialects.openai import CallHeader, patience_s
from tests.servers import eventually
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import PICTURE, FakeWorker
from tests.unit.gateway.openai_calls import GENERATIONS, Diligent, error, events, stepwise

# Generations


def test_a_prompt_is_answered_with_its_picture(client: FlaskClient, broker: Broker, diligent: Diligent) -> None:
    answer = client.post(GENERATIONS, json={"prompt": "a red circle", "user": "u1"})
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    record = broker.view(answer.headers["X-Task-ID"])
    assert record is not None and record.finished_at is not None
    tokens = {"image_tokens": 16, "text_tokens": 0}
    assert answer.get_json() == {
        "created": int(record.finished_at.timestamp()),
        "data": [
            {
                "b64_json": base64.b64encode(PICTURE).decode(),
                "url": None,
                "revised_prompt": None,
                "seed": record.images[0].seed,
            }
        ],
        "background": "opaque",
        "output_format": "png",
        "quality": "high",
        "size": "64x64",
        "usage": {
            "input_tokens": 0,
            "output_tokens": 16,
            "total_tokens": 16,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens_details": tokens,
        },
    }
    assert (record.request.format, record.request.quality, record.request.metadata) == ("png", 100, {"user": "u1"})
    assert not record.request.preview


@pytest.mark.parametrize(("highest", "given"), [("high", "normal"), ("low", "low")])
def test_a_priority_that_is_left_out_is_one_that_the_key_allows(
    client: FlaskClient, broker: Broker, diligent: Diligent, highest: str, given: str
) -> None:
    key = new_key(broker, priority_max=highest)
    assert client.post(GENERATIONS, json={"prompt": "x"}, headers=bearer(key)).status_code == 200
    assert diligent.request.priority == given


def test_fields_of_both_sides_reach_the_task(client: FlaskClient, diligent: Diligent) -> None:
    ours = {
        "negative_prompt": "blue", "seed": 7, "steps": 3, "guidance_scale": 2, "priority": "low", "deadline_s": 60,
        "metadata": {"k": "v"}, "reject_if_late": False,
    }  # fmt: skip
    theirs = {
        "model": "simulated", "n": 2, "size": "128x64", "quality": "low", "output_format": "jpeg", "style": "vivid",
        "output_compression": 0, "background": "opaque", "moderation": "low", "safety_identifier": "s", "user": "u",
        "response_format": "b64_json", "stream": False, "partial_images": 3, "complexity": "high", "x": [{}],
    }  # fmt: skip
    answer = client.post(GENERATIONS, json={"prompt": "x"} | ours | theirs)
    assert (answer.status_code, len(answer.get_json()["data"])) == (200, 2)
    assert (answer.get_json()["quality"], answer.get_json()["size"]) == ("low", "128x64")
    request = diligent.request
    assert (request.width, request.height, request.n, request.format, request.quality) == (128, 64, 2, "jpeg", 1)
    assert (request.negative_prompt, request.seed, request.steps, request.guidance_scale) == ("blue", 7, 3, 2.0)
    assert (request.priority, request.deadline_s, request.metadata) == ("low", 60, {"k": "v", "user": "s"})


def test_null_is_as_good_as_left_out(client: FlaskClient, diligent: Diligent) -> None:
    nothing = dict.fromkeys([*Asked.model_fields, "loras"])
    assert client.post(GENERATIONS, json=nothing | {"prompt": "x"}).status_code == 200
    assert client.post(GENERATIONS, json={"prompt": "x"}).status_code == 200
    first, second = (task.request.model_dump(exclude={"seed"}) for task in diligent.done)
    assert first == second


def test_our_fields_are_declared_as_in_a_native_submit() -> None:
    for model in (ImageGeneration, ImageEdit):
        for name in model.model_fields.keys() & GenerateRequest.model_fields.keys() - {"prompt", "n", "quality"}:
            ours, native = model.model_fields[name], GenerateRequest.model_fields[name]
            assert name == "model" or ours.metadata == native.metadata, name


REFUSED: tuple[tuple[dict[str, Any], Any], ...] = (
    ({"model": "dall-e-3"}, (404, "model_not_found", "model")),
    ({"size": "100x100"}, (400, "invalid_request", "size")),
    ({"size": "64x9999"}, (400, "invalid_request", "size")),
    ({"n": 9}, (400, "invalid_request", "n")),
    ({"n": True}, (400, "invalid_request", "n")),
    ({"output_format": "gif"}, (400, "invalid_request", "output_format")),
    ({"output_compression": -1}, (400, "invalid_request", "output_compression")),
    ({"quality": "ultra"}, (400, "invalid_request", "quality")),
    ({"background": "transparent"}, (400, "invalid_request", "background")),
    ({"steps": 1000}, (400, "invalid_request", "steps")),
    ({"webhook": {"url": ""}}, (400, "invalid_request", "webhook.url")),
    ({"stream": True, "n": 2}, (400, "invalid_request", "n")),
    ({"stream": True, "response_format": "url"}, (400, "invalid_request", "response_format")),
    ({"loras": [{"name": "ink"}]}, (400, "invalid_request", "loras")),
)


def test_a_refusal_names_its_parameter(client: FlaskClient, broker: Broker) -> None:
    for fields, expected in REFUSED:
        answer = client.post(GENERATIONS, json={"prompt": "x"} | fields)
        assert error(answer) == expected, fields
        assert "width" not in answer.get_json()["error"]["message"]
        assert "X-Task-ID" not in answer.headers and answer.headers["X-Should-Retry"] == "false"
    assert broker.pending() == 0


def test_a_model_that_there_is_not_is_told_with_those_that_there_are(client: FlaskClient) -> None:
    message = client.post(GENERATIONS, json={"prompt": "x", "model": "gpt-image-2"}).get_json()["error"]["message"]
    assert message == "model: 'gpt-image-2' is not served here; choose one of: simulated, pico"


def test_other_names_for_models(settings: Settings, broker: Broker, diligent: Diligent) -> None:
    client = create_app(settings.model_copy(update={"model_aliases": ("dall-e-3=simulated",)}), broker).test_client()
    models = client.get("/v1/models").get_json()
    assert [model["id"] for model in models["data"]] == ["simulated", "pico", "dall-e-3"]
    assert models["object"] == "list"
    assert client.get("/v1/models/dall-e-3").get_json() == models["data"][2]
    assert error(client.get("/v1/models/dall-e-2")) == (404, "model_not_found", "model")
    assert client.post(GENERATIONS, json={"prompt": "x", "model": "dall-e-3"}).status_code == 200
    assert diligent.request.model == "simulated"


def test_links_instead_of_pictures(client: FlaskClient, diligent: Diligent) -> None:
    body = {"prompt": "x", "n": 2, "response_format": "url", "output_format": "webp"}
    answer = client.post(GENERATIONS, json=body)
    urls = [image["url"] for image in answer.get_json()["data"]]
    task_id = answer.headers["X-Task-ID"]
    assert [url.partition("?")[0] for url in urls] == [
        f"http://localhost/view/{task_id}/{index}.webp" for index in range(2)
    ]
    for url in urls:
        assert client.get(url.removeprefix("http://localhost")).data == PICTURE


# What becomes of the task


def test_a_task_that_fails_is_told_with_its_id_and_not_repeated(client: FlaskClient, diligent: Diligent) -> None:
    diligent.work = diligent.worker.fail
    answer = client.post(GENERATIONS, json={"prompt": "x"})
    assert error(answer) == (503, "task_failed", None)
    told, task_id = answer.get_json()["error"]["message"], answer.headers["X-Task-ID"]
    assert told == f"task {task_id} failed: pipeline_failed: no picture came of it"
    assert answer.headers["X-Should-Retry"] == "false" and "Retry-After" not in answer.headers


def test_a_task_that_is_canceled_meanwhile(client: FlaskClient, broker: Broker) -> None:
    timer = threading.Timer(0.1, lambda: [broker.cancel(task, None) for task in waiting(broker)])
    timer.start()
    assert error(client.post(GENERATIONS, json={"prompt": "x"})) == (409, "task_canceled", None)


def waiting(broker: Broker) -> list[str]:
    eventually(lambda: broker.pending() > 0)
    return [task.task_id for task in broker.tasks("default", status=None, limit=9, before=None)[0]]


def test_a_deadline_that_passes_is_the_clients_own(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    def expire() -> None:
        while broker.pending():
            time.sleep(0.02)
            broker.expire()

    threading.Timer(0.1, expire).start()
    answer = client.post(GENERATIONS, json={"prompt": "x", "deadline_s": 0.05})
    assert error(answer) == (400, "deadline_exceeded", "deadline_s")


def test_a_call_ends_before_its_client_would_and_the_task_goes_on(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    headers, began = {"X-Stainless-Read-Timeout": "0.3"}, time.monotonic()
    answer = client.post(GENERATIONS, json={"prompt": "x"}, headers=headers)
    assert 0.2 < time.monotonic() - began < 3
    assert error(answer) == (504, "task_unfinished", None)
    task_id = answer.headers["X-Task-ID"]
    assert task_id in answer.get_json()["error"]["message"] and "goes on" in answer.get_json()["error"]["message"]
    assert answer.headers["X-Should-Retry"] == "false"
    assert worker.work() == task_id
    record = broker.view(task_id)
    assert record is not None and record.status == "succeeded"


def test_with_an_idempotency_key_a_repeat_waits_on(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    headers = {"X-Stainless-Read-Timeout": "0.2", "Idempotency-Key": "k"}
    first = client.post(GENERATIONS, json={"prompt": "x"}, headers=headers)
    assert (first.status_code, first.headers["X-Should-Retry"], first.headers["Retry-After"]) == (504, "true", "1")
    task_id = worker.work()
    again = client.post(GENERATIONS, json={"prompt": "x"}, headers=headers)
    assert (again.status_code, again.headers["X-Task-ID"]) == (200, task_id)
    assert first.headers["X-Task-ID"] == task_id


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 590), ({"X-Stainless-Read-Timeout": "600.0"}, 590), ({"X-Stainless-Read-Timeout": "60"}, 55),
        ({"X-Stainless-Timeout": "10"}, 9), ({"X-Stainless-Read-Timeout": "20", "X-Stainless-Timeout": "10"}, 9),
        ({"X-Stainless-Read-Timeout": "nan"}, 590), ({"X-Stainless-Read-Timeout": "-1"}, 590),
        ({"X-Stainless-Read-Timeout": "0"}, 590), ({"X-Stainless-Read-Timeout": "1e3"}, 590),
        ({"X-Stainless-Read-Timeout": "9" * 999}, 590), ({"X-Stainless-Read-Timeout": "."}, 590),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_how_long_a_call_waits(headers: dict[str, str], seconds: float) -> None:
    assert patience_s(CallHeader.model_validate(headers)) == seconds


def test_a_gateway_that_stops_tells_of_the_task(client: FlaskClient) -> None:
    app: Any = client.application
    threading.Timer(0.2, close, [app]).start()
    answer = client.post(GENERATIONS, json={"prompt": "x"})
    assert error(answer) == (504, "task_unfinished", None) and answer.headers["X-Task-ID"]


class Absent:
    """Tasks whose Redis is away at first."""

    closed = False

    def __init__(self, record: TaskRecord, times: int) -> None:
        self.record, self.times = record, times

    def wait(self, *_: object) -> TaskRecord:
        self.times -= 1
        if self.times >= 0:
            raise outcome.RedisUnavailable("away")
        return self.record


def test_a_wait_outlives_an_absence_of_redis(
    broker: Broker, client: FlaskClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "PAUSE_S", 0.01)
    client.post("/api/submit", json={"prompt": "x"})
    record = broker.view(worker.work())
    assert record is not None
    absent: Any = Absent(record, 3)
    assert outcome.wait_for(absent, record.task_id, openai.admission.OPEN, 5) is record
    absent = Absent(record, 10**9)
    with pytest.raises(outcome.TaskUnfinished):
        outcome.wait_for(absent, record.task_id, openai.admission.OPEN, 0.05)


def test_a_picture_that_cannot_be_read_makes_no_other(
    client: FlaskClient, settings: Settings, diligent: Diligent
) -> None:
    def lose(task: Claimed) -> None:
        diligent.worker.succeed(task)
        open_storage(settings).sweep(-60)

    diligent.work = lose
    answer = client.post(GENERATIONS, json={"prompt": "x"})
    if answer.status_code != 200:  # else it was read in between
        assert error(answer)[0] == 503 and answer.headers["X-Should-Retry"] == "false"
        assert answer.headers["X-Task-ID"]


# Streams


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_stream_has_so_many_pictures_on_the_way_at_most(
    client: FlaskClient, broker: Broker, diligent: Diligent, most: int
) -> None:
    stepwise(broker, diligent)
    body = {"prompt": "x", "steps": 8, "stream": True, "partial_images": most, "quality": "medium"}
    answer = client.post(GENERATIONS, json=body)
    assert answer.headers["X-Accel-Buffering"] == "no"
    task_id, (*partial, (name, last)) = answer.headers["X-Task-ID"], events(answer)
    assert answer.text.startswith(f": task {task_id} is ")
    assert diligent.request.preview == bool(most)
    assert len(partial) == most and {each for each, _ in partial} <= {"image_generation.partial_image"}
    assert [data["partial_image_index"] for _, data in partial] == list(range(most))
    assert len({data["b64_json"] for _, data in partial}) == most
    assert all((data["output_format"], data["size"]) == ("webp", "64x64") for _, data in partial)
    assert name == last["type"] == "image_generation.completed"
    assert base64.b64decode(last["b64_json"]) == PICTURE
    assert (last["output_format"], last["quality"], last["usage"]["output_tokens"]) == ("png", "medium", 16)


def test_a_stream_that_fails_ends_with_an_error(client: FlaskClient, diligent: Diligent) -> None:
    diligent.work = diligent.worker.fail
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    ((name, data),) = events(answer)
    assert (name, data["type"], data["error"]["code"], data["error"]["type"]) == (
        "error", "error", "task_failed", "server_error",
    )  # fmt: skip
    assert answer.headers["X-Task-ID"] in data["error"]["message"]


def test_a_stream_of_a_gateway_that_stops(client: FlaskClient) -> None:
    app: Any = client.application
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": True})
    threading.Timer(0.1, close, [app]).start()
    ((_, data),) = events(answer)
    assert data["error"]["code"] == "task_unfinished" and answer.headers["X-Task-ID"] in data["error"]["message"]


def test_whoever_hangs_up_is_forgotten_and_the_task_is_not(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    answer = client.post(GENERATIONS, json={"prompt": "x", "stream": True})
    answer.close()
    assert client.application.extensions[TASKS]._hub._count == 0
    assert worker.work() == answer.headers["X-Task-ID"]


# Addresses


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/chat/completions", (404, "not_found", None)), ("GET", "/v1/", (404, "not_found", None)),
        ("GET", GENERATIONS, (405, "method_not_allowed", None)),
        ("PUT", "/v1/models", (405, "method_not_allowed", None)),
    ],
)  # fmt: skip
def test_other_addresses_under_v1(client: FlaskClient, method: str, path: str, expected: Any) -> None:
    assert error(client.open(path, method=method)) == expected


def test_addresses_elsewhere_keep_their_form(client: FlaskClient) -> None:
    assert client.get("/v2/models").content_type == "application/problem+json"
    assert client.get("/v1").content_type == "application/problem+json"
