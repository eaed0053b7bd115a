"""Pictures over HTTP: sent by themselves, or with a submit, in each of the ways that there are."""

from __future__ import annotations

import base64
import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse, stream_encode_multipart

from common.broker import Broker
from common.errors import StorageError
from common.inputs import storage_key
from common.problem import Problem
from common.schemas import InputImage, SubmitAnswer
from common.settings import Settings
from common.storage import open_storage
from gateway import bodies, diskguard
from gateway.app import create_app
from tests.samples import drawn, encoded, lying_png
from tests.unit.gateway.fake_worker import FakeWorker

PNG, JPEG, WEBP = (encoded(kind=kind) for kind in ("PNG", "JPEG", "WEBP"))
MASK = encoded(Image.new("L", (48, 32), 255))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file(data: bytes, name: str = "whatever.txt") -> tuple[io.BytesIO, str]:
    return io.BytesIO(data), name


def upload(client: FlaskClient, data: bytes = PNG) -> str:
    answer = client.post("/api/images", data=data, content_type="image/png")
    assert answer.status_code == 201, answer.text
    return InputImage.model_validate_json(answer.data).handle


def submit(client: FlaskClient, *, key: str = "", **fields: Any) -> TestResponse:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/api/submit", json={"prompt": "x", "model": "simulated"} | fields, headers=headers)


def form(client: FlaskClient, *, key: str = "", **parts: Any) -> TestResponse:
    """Submit as a form; `request` has the model in it if it is not given."""
    headers = {"Idempotency-Key": key} if key else {}
    data = {"request": json.dumps({"prompt": "x", "model": "simulated"})} | parts
    return client.post("/api/submit", data=data, content_type="multipart/form-data", headers=headers)


def made(broker: Broker, answer: TestResponse) -> Any:
    """The request of the task that came of this answer."""
    assert answer.status_code == 202, answer.text
    record = broker.view(SubmitAnswer.model_validate_json(answer.data).task_id)
    assert record is not None
    return record.request


def told(answer: TestResponse, status: int = 422) -> dict[str, str]:
    """What is wrong, by field."""
    problem = Problem.model_validate_json(answer.data)
    assert (answer.status_code, problem.status) == (status, status), answer.text
    return {error.loc: error.msg for error in problem.errors}


def stored(settings: Settings) -> list[str]:
    return sorted(path.stem for path in (settings.results_dir / "inputs").glob("*"))


# A picture by itself


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_is_sent_as_it_is_in_a_form_or_in_json(client: FlaskClient, settings: Settings, kind: str) -> None:
    data = encoded(kind=kind.upper())
    answers = [
        client.post("/api/images", data=data, content_type=f"image/{kind}"),
        client.post("/api/images", data=data, content_type="image/png"),
        client.post("/api/images", data={"image": file(data)}, content_type="multipart/form-data"),
        client.post("/api/images", json={"image": text(data)}),
        client.post("/api/images", json={"image": f"data:image/{kind};base64,{text(data)}"}),
    ]
    for answer in answers:
        found = InputImage.model_validate_json(answer.data)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
        assert (found.width, found.height, found.format, found.bytes) == (48, 32, kind, len(data))
        assert abs(found.expires_at - datetime.now(UTC) - timedelta(days=7)) < timedelta(minutes=1)
        kept = Image.open(io.BytesIO(open_storage(settings).read(storage_key(found.handle))))
        assert (kept.format, kept.size, kept.mode) == ("PNG", (48, 32), "RGB")
    assert len(stored(settings)) == len(answers)


@pytest.mark.parametrize(
    ("sent", "status", "loc"),
    [
        ({"data": b"", "content_type": "image/png"}, 422, "image"),
        ({"data": b"hello", "content_type": "image/png"}, 422, "image"),
        ({"data": lying_png(40_000, 40_000), "content_type": "image/png"}, 422, "image"),
        ({"data": PNG[:-200], "content_type": "image/png"}, 422, "image"),
        ({"data": encoded(kind="GIF"), "content_type": "image/gif"}, 415, ""),
        ({"data": PNG, "content_type": "application/octet-stream"}, 415, ""),
        ({"data": PNG, "content_type": "application/x-www-form-urlencoded"}, 415, ""),
        ({"data": PNG}, 400, "body"),
        ({"json": {}}, 422, "image"),
        ({"json": {"image": 5}}, 422, "image"),
        ({"json": {"image": ""}}, 422, "image"),
        ({"json": {"image": "no picture"}}, 422, "image"),
        ({"json": {"image": "data:image/png;base64,AAAA"}}, 422, "image"),
        ({"json": {"image": "sha256:" + "0" * 64}}, 422, "image"),
        ({"json": {"image": text(PNG), "name": "x"}}, 422, "name"),
        ({"data": {"image": file(b"x")}, "content_type": "multipart/form-data"}, 422, "image"),
        ({"data": {"image": "x"}, "content_type": "multipart/form-data"}, 422, "image"),
        ({"data": {"other": file(PNG)}, "content_type": "multipart/form-data"}, 422, "other"),
        ({"data": {"image": [file(PNG), file(PNG)]}, "content_type": "multipart/form-data"}, 422, "image"),
        ({"data": {}, "content_type": "multipart/form-data; boundary=x"}, 422, "image"),
        ({"data": b"junk", "content_type": "multipart/form-data; boundary=x"}, 400, "body"),
    ],
)
def test_what_is_no_picture_is_refused_and_not_stored(
    client: FlaskClient, settings: Settings, sent: dict[str, Any], status: int, loc: str
) -> None:
    assert set(told(client.post("/api/images", **sent), status)) == ({loc} if loc else set())
    assert stored(settings) == []


def test_a_message_says_what_is_wrong_and_what_would_be_right(client: FlaskClient) -> None:
    limit = 16 * 1024 * 1024
    answer = submit(client, init_image=text(lying_png(40_000, 40_000)), mask_image="hell")
    assert told(answer) == {
        "init_image": f"has 40000x40000 pixels; at most {limit} (ZFLEET_INPUT_MAX_PIXELS)",
        "mask_image": "is no PNG, JPEG or WebP picture",
    }


# With a submit


def test_a_submit_names_a_handle(client: FlaskClient, broker: Broker) -> None:
    handle, mask = upload(client), upload(client, MASK)
    request = made(broker, submit(client, init_image=handle, mask_image=mask, strength=0.5))
    assert (request.init_image, request.mask_image, request.strength) == (handle, mask, 0.5)
    assert (request.width, request.height) == (48, 32), "the picture's own size"


def test_a_submit_brings_its_pictures_in_json(client: FlaskClient, broker: Broker, settings: Settings) -> None:
    request = made(broker, submit(client, init_image=text(JPEG), mask_image=f"data:image/png;base64,{text(MASK)}"))
    assert stored(settings) == sorted([request.init_image, request.mask_image])
    request = made(broker, submit(client, reference_images=[text(PNG), upload(client), text(WEBP)]))
    assert len(set(request.reference_images)) == 3


def test_a_submit_brings_its_pictures_in_a_form(client: FlaskClient, broker: Broker, settings: Settings) -> None:
    request = made(broker, form(client, init_image=file(JPEG), mask_image=file(MASK)))
    assert stored(settings) == sorted([request.init_image, request.mask_image])
    handle = upload(client)
    asked = {"prompt": "x", "model": "simulated", "reference_images": [handle]}
    for part in (json.dumps(asked), file(json.dumps(asked).encode(), "request.json")):
        answer = form(client, request=part, reference_images=[file(PNG), file(WEBP)])
        request = made(broker, answer)
        assert (len(request.reference_images), request.reference_images[0]) == (3, handle)
    assert made(broker, form(client)).prompt == "x", "a form without any file"


@pytest.mark.parametrize(
    ("parts", "status", "locs"),
    [
        ({"init_image": file(b"x")}, 422, {"init_image"}),
        ({"init_image": file(b"x"), "mask_image": file(b"y")}, 422, {"init_image", "mask_image"}),
        ({"reference_images": [file(PNG), file(b"x")]}, 422, {"reference_images.1"}),
        ({"init_image": [file(PNG), file(PNG)]}, 422, {"init_image"}),
        ({"init_image": "img_x"}, 422, {"init_image"}),
        ({"prompt": "x"}, 422, {"prompt"}),
        ({"prompt": file(b"x")}, 422, {"prompt"}),
        ({"n" * 3000: file(b"x")}, 422, {"n" * 100}),
        ({"request": "{"}, 400, {"body"}),
        ({"request": "[]"}, 400, {"body"}),
        ({"request": "[" * 100_000}, 400, {"body"}),
        ({"request": ["{}", "{}"]}, 422, {"request"}),
        ({"request": '{"prompt": ""}'}, 422, {"prompt"}),
        ({"request": '{"prompt": "x", "init_image": "y"}', "init_image": file(PNG)}, 422, {"init_image"}),
        ({"request": '{"prompt": "x", "reference_images": 5}', "reference_images": file(PNG)}, 422,
         {"reference_images.0"}),
        ({"request": file(b" " * (1 << 20) + b"{}")}, 422, {"request"}),
        ({"request": " " * (1 << 20) + "{}"}, 400, {"body"}),
        ({f"p{k}": "" for k in range(20)}, 400, {"body"}),
    ],
)  # fmt: skip
def test_a_form_that_is_wrong_is_told_its_part(
    client: FlaskClient, broker: Broker, settings: Settings, parts: dict[str, Any], status: int, locs: set[str]
) -> None:
    assert set(told(form(client, **parts), status)) == locs
    assert (broker.pending(), stored(settings)) == (0, [])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_form_that_breaks_off_is_refused(client: FlaskClient, broker: Broker, share: float) -> None:
    parts = {"request": '{"prompt": "x", "model": "simulated"}', "init_image": file(PNG), "mask_image": file(MASK)}
    stream, length, boundary = stream_encode_multipart(parts)
    raw = stream.read(int(length * share))
    answer = client.post("/api/submit", data=raw, content_type=f"multipart/form-data; boundary={boundary}")
    assert set(told(answer, 400)) == {"body"}
    assert broker.pending() == 0


@pytest.mark.parametrize("disposition", ["form-data", 'form-data; name="Ü\\"', "form-data; name", 'x; filename="y"'])
def test_a_part_without_a_name_is_refused(client: FlaskClient, disposition: str) -> None:
    raw = f"--B\r\nContent-Disposition: {disposition}\r\n\r\n{{}}\r\n--B--\r\n".encode()
    for path in ("/api/submit", "/api/images"):
        answer = client.post(path, data=raw, content_type="multipart/form-data; boundary=B")
        assert told(answer, 400) == {"body": "every part of a form must have a name"}


def test_a_form_of_another_sites_page_is_refused(client: FlaskClient, broker: Broker) -> None:
    def send(**headers: str) -> int:
        data = {"request": '{"prompt": "x", "model": "simulated"}'}
        return client.post("/api/submit", data=data, content_type="multipart/form-data", headers=headers).status_code

    assert [send(Origin=origin) for origin in ("https://evil.example", "null", "http://localhost:1")] == [403] * 3
    assert broker.pending() == 0
    assert send(Origin="http://localhost") == 202


@pytest.mark.parametrize("handle", ["img_" + "0" * 32, "img_0", "sha256:" + "0" * 64])
def test_an_unknown_handle_is_refused(client: FlaskClient, broker: Broker, handle: str) -> None:
    upload(client)
    assert set(told(submit(client, init_image=handle))) == {"init_image"}
    assert broker.pending() == 0


def test_an_expired_handle_says_so(client: FlaskClient, settings: Settings) -> None:
    handle = upload(client)
    open_storage(settings).delete(storage_key(handle))
    assert told(submit(client, init_image=handle)) == {
        "init_image": "is unknown here, or was not used for too long; send the picture again"
    }


def test_a_submit_lets_its_picture_live_as_long_as_the_task(client: FlaskClient, settings: Settings) -> None:
    import os

    handle = upload(client)
    store = open_storage(settings)
    path = store.path(storage_key(handle))
    assert path is not None
    os.utime(path, (0, 0))
    assert submit(client, init_image=handle).status_code == 202
    assert store.sweep(3600) == 0
    assert store.exists(storage_key(handle))


def test_what_cannot_be_is_refused_without_a_look_at_the_pictures(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.pictures.canonical", lambda *_: pytest.fail("it was decoded"))
    assert set(told(submit(client, mask_image=text(PNG), width=3))) == {"mask_image", "width"}


# Once and whole


def test_the_same_key_and_pictures_are_one_task_however_they_are_sent(
    client: FlaskClient, broker: Broker, settings: Settings
) -> None:
    first = submit(client, key="k", init_image=text(PNG)).get_json()["task_id"]
    before = stored(settings)
    assert submit(client, key="k", init_image="data:image/png;base64," + text(PNG)).get_json()["task_id"] == first
    assert form(client, key="k", init_image=file(PNG)).get_json()["task_id"] == first
    assert form(client, key="k", init_image=file(PNG, "other.png")).get_json()["task_id"] == first
    for other in (submit(client, key="k", init_image=text(JPEG)), form(client, key="k", init_image=file(WEBP))):
        assert other.get_json(force=True)["code"] == "idempotency_conflict"
    assert stored(settings) == before, "nothing is left of those that made no task"
    assert broker.pending() == 1


def test_the_same_key_and_handle_are_one_task(client: FlaskClient) -> None:
    handle = upload(client)
    ids = {submit(client, key="k", init_image=handle).get_json()["task_id"] for _ in range(2)}
    assert len(ids) == 1
    assert submit(client, key="k", init_image=upload(client)).status_code == 409, "another handle is another picture"


def test_a_full_queue_leaves_no_picture(settings: Settings) -> None:
    tight = settings.model_copy(update={"queue_cap": 1})
    client = create_app(tight, Broker(tight)).test_client()
    handle = upload(client)
    assert submit(client).status_code == 202
    assert submit(client, init_image=text(PNG)).status_code == 429
    assert submit(client, init_image=handle).status_code == 429
    assert stored(settings) == [handle], "what was sent by itself stays"


def test_a_full_disk_takes_no_picture_but_finds_what_was_accepted(
    client: FlaskClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(client, key="k", init_image=text(PNG)).get_json()["task_id"]
    before = stored(settings)
    monkeypatch.setattr("common.storage.local.Storage.fullness", lambda _: 0.93)
    monkeypatch.setattr(diskguard, "LOOK_EVERY_S", 0.0)
    client = create_app(settings).test_client()
    answer = client.post("/api/images", data=PNG, content_type="image/png")
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "storage_full")
    assert submit(client, init_image=text(PNG)).get_json(force=True)["code"] == "storage_full"
    assert submit(client, key="k", init_image=text(PNG)).get_json()["task_id"] == first
    assert stored(settings) == before


def test_a_storage_that_fails_is_a_503_and_nothing_is_accepted_by_halves(
    client: FlaskClient, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.storage.local import Storage

    put, keys = Storage.put, iter(range(9))

    def second_fails(self: Storage, key: str, data: bytes) -> None:
        if next(keys) % 2:
            raise StorageError("the disk is gone")
        put(self, key, data)

    monkeypatch.setattr(Storage, "put", second_fails)
    answer = submit(client, init_image=text(PNG), mask_image=text(MASK))
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "storage_error")
    assert (broker.pending(), stored(settings)) == (0, [])
    monkeypatch.setattr(Storage, "put", lambda *_: (_ for _ in ()).throw(StorageError("the disk is gone")))
    assert client.post("/api/images", data=PNG, content_type="image/png").status_code == 503
    monkeypatch.setattr(Storage, "exists", lambda *_: (_ for _ in ()).throw(StorageError("no mount")))
    assert submit(client, init_image="img_" + "0" * 32).status_code == 503


# Limits


def test_json_is_large_by_its_pictures_or_refused(client: FlaskClient, broker: Broker) -> None:
    large = encoded(drawn(1200, 1000), compress_level=0)
    assert len(large) > bodies.JSON_LIMIT_BYTES
    assert submit(client, init_image=text(large)).status_code == 202
    body = json.dumps({"prompt": "x", **{f"a{k}": 0 for k in range(200_000)}})
    answer = client.post("/api/submit", data=body, content_type="application/json")
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (400, "malformed_body")
    assert "not by its pictures" in answer.get_json(force=True)["detail"]
    assert broker.pending() == 1


def test_too_much_is_told_the_limit(client: FlaskClient) -> None:
    client.application.config["MAX_CONTENT_LENGTH"] = 4000
    large = encoded(drawn(200, 200), compress_level=0)
    for answer in (
        client.post("/api/images", data=large, content_type="image/png"),
        client.post("/api/images", data={"image": file(large)}, content_type="multipart/form-data"),
        client.post("/api/images", json={"image": text(large)}),
        form(client, init_image=file(large)),
    ):
        assert answer.status_code == 413
        assert "4000 bytes" in answer.get_json(force=True)["detail"]


def test_large_bodies_take_turns_and_plain_submits_none(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_TURN_S", 0.05)
    large = encoded(drawn(700, 600), compress_level=0)
    for _ in range(bodies.READS_AT_ONCE):
        assert bodies._turns.acquire(blocking=False)
    try:
        answer = form(client, init_image=file(large))
        assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "too_busy")
        assert int(answer.headers["Retry-After"]) > 0
        assert submit(client).status_code == 202
        assert form(client, init_image=file(PNG)).status_code == 202, "small ones, whose senders may dawdle, take none"
    finally:
        for _ in range(bodies.READS_AT_ONCE):
            bodies._turns.release()
    assert form(client, init_image=file(large)).status_code == 202


def test_a_form_without_its_request_and_a_foreign_kind_are_told_what_is_missing(client: FlaskClient) -> None:
    answer = client.post("/api/submit", data={"init_image": file(PNG)}, content_type="multipart/form-data")
    assert "JSON of prompt" in told(answer)["request"]
    answer = client.post("/api/images", data=PNG, content_type="image/gif")
    assert answer.status_code == 415
    assert "image/png, image/jpeg, image/webp" in answer.get_json(force=True)["detail"]


def test_the_description_shows_json_forms_and_pictures(client: FlaskClient) -> None:
    described = client.get("/openapi.json").get_json()
    content = described["paths"]["/api/submit"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    schema = described["components"]["schemas"]["SubmitForm"]["properties"]
    assert set(schema) == {"request", "init_image", "mask_image", "control_image", "reference_images"}
    assert schema["reference_images"]["items"] == {"type": "string", "format": "binary"}
    images = described["paths"]["/api/images"]["post"]
    kinds = {"application/json", "multipart/form-data", "image/png", "image/jpeg", "image/webp"}
    assert set(images["requestBody"]["content"]) == kinds
    assert images["requestBody"]["content"]["image/webp"]["schema"]["format"] == "binary"
    assert {"201", "400", "415", "422", "503"} <= set(images["responses"])


def test_models_say_what_they_can_be_made_from(client: FlaskClient) -> None:
    rows = {row["name"]: row for row in client.get("/api/models").get_json()["models"]}
    assert rows["pico"]["modes"] == ["text", "image", "inpaint"]
    assert rows["pico"]["loras"] == []


def test_a_model_that_takes_no_loras_lists_none_and_refuses_them(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(models=["pico", "simulated"], loras=["ink"])
    rows = {row["name"]: row["loras"] for row in client.get("/api/models").get_json()["models"]}
    assert (rows["pico"], rows["simulated"]) == (["ink"], [])
    answer = client.post("/api/submit", json={"prompt": "x", "model": "simulated", "loras": [{"name": "ink"}]})
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.get_json()["errors"]] == ["loras"]
