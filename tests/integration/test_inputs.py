"""Pictures that clients send, from the edge to the pipeline and back: Nginx, gunicorn, storage, Redis, a worker."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from common.inputs import storage_key
from common.problem import Problem
from common.storage import open_storage
from tests.integration import test_fleet
from tests.integration.test_fleet import Fleet
from tests.samples import drawn, encoded, noise
from zfleet.client import Client

fleet = test_fleet.fleet  # one for this module

Picture = NDArray[np.int16]


def upload(fleet: Fleet, data: bytes, kind: str = "image/png") -> dict[str, Any]:
    answer = requests.post(fleet.url + "/api/images", data=data, headers={"Content-Type": kind}, timeout=60)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def form(fleet: Fleet, files: dict[str, bytes], **fields: object) -> requests.Response:
    parts: list[Any] = [("request", (None, json.dumps(fields), "application/json"))]
    parts += [(name, (f"{name}.png", data)) for name, data in files.items()]
    return requests.post(fleet.url + "/api/submit", files=parts, timeout=60)


def pixels(fleet: Fleet, view: dict[str, Any]) -> Picture:
    assert view["status"] == "succeeded", view["error"]
    return fleet.pixels(view["images"][0])


def apart(one: Picture, other: Picture) -> float:
    """The mean difference of two pictures, in steps of 255."""
    return float(np.abs(one - other).mean())


def test_a_photo_sent_ahead_is_what_a_task_starts_from(fleet: Fleet) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(drawn(300, 400).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    sent = upload(fleet, photo, "image/jpeg")
    assert (sent["width"], sent["height"], sent["format"], sent["bytes"]) == (300, 400, "jpeg", len(photo))
    view = fleet.make(prompt="x", model="simulated", init_image=sent["handle"], strength=0.5)
    assert view["status"] == "succeeded", view["error"]
    assert (view["images"][0]["width"], view["images"][0]["height"]) == (304, 400)
    assert (view["request"]["init_image"], view["request"]["strength"]) == (sent["handle"], 0.5)


def test_pictures_come_along_in_json_or_in_a_form(fleet: Fleet) -> None:
    text = base64.b64encode(encoded(kind="WEBP")).decode()
    view = fleet.make(prompt="x", model="simulated", reference_images=[text, f"data:image/webp;base64,{text}"])
    assert (view["status"], len(view["request"]["reference_images"])) == ("succeeded", 2)
    answer = form(fleet, {"init_image": encoded(), "mask_image": encoded()}, prompt="x", model="simulated")
    view = fleet.finished(answer.json()["task_id"])
    assert (view["status"], view["request"]["strength"], view["request"]["width"]) == ("succeeded", 1.0, 48)


def test_the_python_client_sends_files(fleet: Fleet, tmp_path: Any) -> None:
    (tmp_path / "ein Bild.png").write_bytes(encoded())
    with Client(fleet.url) as client:
        handle = client.upload(tmp_path / "ein Bild.png").handle
        made = client.generate(
            "x", model="simulated", init_image=tmp_path / "ein Bild.png", mask_image=handle, strength=0.5
        )
        assert made.view.request.mask_image == handle
        assert "inpaint" in {row.name: row for row in client.models()}["simulated"].modes


def test_a_picture_that_left_storage_fails_its_task_with_that_reason(fleet: Fleet) -> None:
    """It is swept while tasks before it keep the worker busy."""
    handle = upload(fleet, encoded())["handle"]
    busy = [fleet.post("/api/submit", {"prompt": "x", "model": "simulated", "n": 8}) for _ in range(6)]
    answer = fleet.post("/api/submit", {"prompt": "x", "model": "simulated", "init_image": handle, "priority": "low"})
    open_storage(fleet.settings).delete(storage_key(handle))
    view = fleet.finished(answer.json()["task_id"])
    assert (view["status"], view["error"]["code"], view["error"]["retryable"]) == ("failed", "input_gone", False)
    assert {fleet.finished(one.json()["task_id"])["status"] for one in busy} == {"succeeded"}
    again = fleet.post("/api/submit", {"prompt": "x", "model": "simulated", "init_image": handle})
    assert (again.status_code, again.headers["Content-Type"]) == (422, "application/problem+json")
    assert [error["loc"] for error in again.json()["errors"]] == ["init_image"]


def test_a_large_picture_passes_and_one_beyond_the_limit_does_not(fleet: Fleet) -> None:
    large = noise(2688, 2688)
    assert len(large) > 20 << 20
    assert upload(fleet, large)["width"] == 2688
    answer = form(fleet, {"init_image": large}, prompt="x", model="simulated", width=64, height=64)
    assert fleet.finished(answer.json()["task_id"])["status"] == "succeeded"
    refused = [
        requests.post(
            fleet.url + "/api/images", data=bytes(101 << 20), headers={"Content-Type": "image/png"}, timeout=60
        ),
        fleet.post("/api/submit", {"prompt": "x", "model": "simulated", "init_image": "A" * (33 << 20)}),
    ]
    for answer in refused:
        problem = Problem.model_validate_json(answer.content)
        assert (answer.status_code, problem.status, problem.code) == (413, 413, "body_too_large")
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_others_are_answered_while_large_pictures_are_read(fleet: Fleet) -> None:
    photo = encoded(drawn(4000, 4000), "JPEG")
    senders = [threading.Thread(target=upload, args=(fleet, photo)) for _ in range(4)]
    for sender in senders:
        sender.start()
    waits = []
    while any(sender.is_alive() for sender in senders):
        began = time.monotonic()
        assert fleet.get("/api/templates").ok
        waits.append(time.monotonic() - began)
    assert len(waits) > 20
    assert sorted(waits)[len(waits) // 2] < 0.5 and max(waits) < 4


# With pico, whose pipeline really starts from the pictures


SCENE = {"model": "pico", "format": "png", "width": 128, "height": 128, "seed": 7}


@pytest.fixture(scope="module")
def circle(fleet: Fleet) -> dict[str, Any]:
    """A picture that pico made of a prompt, and its file."""
    view = fleet.make(prompt="a red circle on a grey background", **SCENE)
    file = fleet.get(view["images"][0]["url"]).content
    return {"file": file, "pixels": pixels(fleet, view)}


def test_pico_paints_over_as_much_of_a_picture_as_strength_says(fleet: Fleet, circle: dict[str, Any]) -> None:
    handle = upload(fleet, circle["file"])["handle"]
    square = {"prompt": "a blue square on a white background", "steps": 20, **SCENE}
    distances = [
        apart(pixels(fleet, fleet.make(**square, init_image=handle, strength=strength)), circle["pixels"])
        for strength in (0.05, 0.3, 1.0)
    ]
    assert distances[0] < 6, "with one step of twenty to do it is the same picture still"
    assert distances[0] + 40 < distances[1] < distances[2]


def test_pico_paints_inside_the_mask_alone(fleet: Fleet, circle: dict[str, Any]) -> None:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    answer = form(
        fleet, {"init_image": circle["file"], "mask_image": encoded(mask)},
        prompt="a blue square on a white background", **SCENE,
    )  # fmt: skip
    made = pixels(fleet, fleet.finished(answer.json()["task_id"]))
    kept, painted = slice(0, 48), slice(80, 128)
    assert apart(made[:, kept], circle["pixels"][:, kept]) < 12
    assert apart(made[:, painted], circle["pixels"][:, painted]) > 20
