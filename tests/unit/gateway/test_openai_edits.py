"""Edits in the OpenAI dialect: forms with pictures, masks that are transparent where to paint."""

from __future__ import annotations

import io
import threading
from typing import Any

from flask.testing import FlaskClient
from PIL import Image

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from gateway.app import close
from tests.samples import drawn, encoded
from tests.servers import eventually
from tests.unit.gateway.openai_calls import EDITS, Diligent, error, events, stepwise


def holes() -> bytes:
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", (48, 32), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 24, 32))
    return encoded(mask)


def form(**parts: Any) -> dict[str, Any]:
    """Parts of a form; bytes are files."""

    def part(value: Any) -> Any:
        return (io.BytesIO(value), "x.png") if isinstance(value, bytes) else value

    return {
        name: [part(each) for each in value] if isinstance(value, list) else part(value)
        for name, value in ({"prompt": "x"} | parts).items()
    }


def stored(settings: Settings, handle: str | None) -> Image.Image:
    assert handle is not None
    return Image.open(io.BytesIO(open_storage(settings).read(f"inputs/{handle}.png")))


def test_an_edit_with_a_mask_paints_inside_its_holes(
    client: FlaskClient, broker: Broker, diligent: Diligent, settings: Settings
) -> None:
    answer = client.post(EDITS, data=form(image=encoded(), mask=holes(), size="64x64", n="2", seed="5"))
    assert answer.status_code == 200, answer.text
    assert len(answer.get_json()["data"]) == 2
    request = diligent.request
    assert (request.strength, request.seed, request.reference_images) == (1.0, 5, ())
    mask = stored(settings, request.mask_image)
    assert (mask.mode, mask.getpixel((3, 3)), mask.getpixel((40, 3))) == ("L", 255, 0)
    assert stored(settings, request.init_image).size == (48, 32)


def test_an_edit_without_a_mask_takes_references_where_the_model_edits(client: FlaskClient, diligent: Diligent) -> None:
    assert client.post(EDITS, data=form(image=encoded(), model="simulated")).status_code == 200
    assert len(diligent.request.reference_images) == 1 and diligent.request.init_image is None
    several = {"image[]": [encoded(), encoded(drawn(16, 16))]}
    assert client.post(EDITS, data=form(**several)).status_code == 200
    assert len(diligent.request.reference_images) == 2


def test_an_edit_by_a_model_that_does_not_edit_starts_from_the_picture(client: FlaskClient, broker: Broker) -> None:
    answer = client.post(EDITS, data=form(image=encoded(), model="pico", stream="true", strength="0.5"))
    assert answer.status_code == 200
    record = broker.view(answer.headers["X-Task-ID"])
    assert record is not None and record.request.init_image and record.request.strength == 0.5


def test_an_edit_streams_under_its_own_names(client: FlaskClient, broker: Broker, diligent: Diligent) -> None:
    stepwise(broker, diligent)
    parts = form(image=encoded(), stream="true", partial_images="1", steps="4")
    names = [name for name, _ in events(client.post(EDITS, data=parts))]
    assert names == ["image_edit.partial_image", "image_edit.completed"]


def test_objects_in_a_form(client: FlaskClient, diligent: Diligent) -> None:
    parts = {"webhook[url]": "https://hooks.example/x", "webhook[events][]": ["started", "ended"], "metadata[a b]": "c"}
    assert client.post(EDITS, data=form(image=encoded(), **parts)).status_code == 200
    webhook = diligent.request.webhook
    assert webhook is not None and (webhook.url, webhook.events) == ("https://hooks.example/x", ["started", "ended"])
    assert diligent.request.metadata == {"a b": "c"}
    parts = {"webhook": '{"url": "https://hooks.example/y"}', "metadata": '{"k": "v"}'}
    assert client.post(EDITS, data=form(image=encoded(), **parts)).status_code == 200
    assert (diligent.request.webhook, diligent.request.metadata) != (None, {})


BAD_EDITS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "image"), ({"image": "text"}, "image"), ({"image[]": "text"}, "image"), ({"image": b"no picture"}, "image.0"),
    ({"image": [encoded()] * 5}, "image"), ({"image": [encoded()] * 2, "mask": holes()}, "image"),
    ({"image": encoded(), "mask": encoded()}, "mask"), ({"image": encoded(), "mask": b"x"}, "mask"),
    ({"image": encoded(), "mask": [holes(), holes()]}, "mask"), ({"image": encoded(), "mask": "text"}, "mask"),
    ({"image": encoded(), "prompt": ""}, "prompt"), ({"image": encoded(), "prompt": ["a", "b"]}, "prompt"),
    ({"image": encoded(), "n": "many"}, "n"), ({"image": encoded(), "stream": "perhaps"}, "stream"),
    ({"image": encoded(), "webhook": "{"}, "webhook"), ({"image": encoded(), "webhook": "[" * 9999}, "webhook"),
    ({"image": encoded(), "webhook[url][]": "x"}, "webhook.url"), ({"image": encoded(), "n[]": "1"}, "n"),
    ({"image": encoded(), "n": "1", "n[a]": "2", "strength": "2"}, "strength"),
    ({"image": encoded(), "size": "7x7"}, "size"), ({"image": [encoded()] * 2, "model": "pico"}, "image"),
)  # fmt: skip


def test_a_bad_edit_names_its_part_and_leaves_nothing(client: FlaskClient, broker: Broker, settings: Settings) -> None:
    for parts, param in BAD_EDITS:
        answer = client.post(EDITS, data=form(**parts), content_type="multipart/form-data")
        assert (answer.status_code, answer.get_json()["error"]["param"]) == (400, param), answer.text
    assert broker.pending() == 0
    assert not list(settings.results_dir.rglob("*.png"))


NO_FORMS: tuple[tuple[str | None, bytes, int], ...] = (
    ("application/json", b"{}", 415), (None, b"", 415), ("multipart/form-data", b"x", 415),
    ("multipart/form-data; boundary=x", b"", 400), ("multipart/form-data; boundary=x", b"--x\r\nrubbish", 400),
    ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", 400),
    ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 49, 400),
)  # fmt: skip


def test_what_is_no_form_is_no_edit(client: FlaskClient, broker: Broker) -> None:
    for kind, body, status in NO_FORMS:
        assert error(client.post(EDITS, data=body, content_type=kind))[0] == status, (kind, body)
    assert broker.pending() == 0


def test_large_edits_wait_for_their_pictures_outside_the_door(client: FlaskClient, broker: Broker) -> None:
    """Else four that wait ten minutes for a GPU would keep every other large body out."""
    app: Any = client.application
    large = encoded(drawn(900, 900), "PNG", compress_level=0)
    assert len(large) > 1 << 20
    threads = [
        threading.Thread(target=lambda: app.test_client().post(EDITS, data=form(image=large, n="1"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: broker.pending() == 6)
    close(app)
    for thread in threads:
        thread.join()
