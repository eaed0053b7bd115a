from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from common.errors import ConfigurationError, InvalidRequest
from common.models import load_catalogue
from common.schemas import GenerateRequest
from common.settings import Settings, load_settings
from common.templates import TemplateView
from gateway import fields, submission, templates
from gateway.app import close, create_app
from tests.samples import encoded
from tests.unit.gateway.fake_worker import FakeWorker

GOOD = """\
model = "base"
width = 768
height = 1024
steps = 30
guidance_scale = 3.5
negative_prompt = "blur, {paper} torn"
format = "png"
prompt = "A watercolour of {prompt} on {paper}{more}."
[title]
en = "Watercolour"
zh = "水彩"
[description]
en = "Loose brushwork."
zh = "写意水彩。"
[placeholders.prompt]
title = {en = "Motif", zh = "主题"}
[placeholders.paper]
title = {en = "Paper", zh = "纸张"}
default = "rough paper"
[placeholders.more]
title = {en = "More", zh = "其他"}
default = ""
"""

Write = Callable[..., Settings]


@pytest.fixture
def write(settings: Settings, tmp_path: Path) -> Write:
    """Put a template into a folder of its own; return settings with it."""
    folder = tmp_path / "own templates"
    folder.mkdir()

    def write(text: str = GOOD, name: str = "own.toml", models: tuple[str, ...] = ("pico", "base")) -> Settings:
        (folder / name).write_text(text, "utf-8")
        return settings.model_copy(update={"templates_dir": folder, "models": models})

    return write


@pytest.fixture
def client(write: Write) -> Iterator[FlaskClient]:
    app = create_app(write())
    yield app.test_client()
    close(app)


def submit(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    """Submit, and return the request as its status shows it."""
    answer = client.post("/api/submit", json={"template": "own", "prompt": "a fox"} | fields)
    assert answer.status_code == 202, answer.text
    return dict(client.get(answer.get_json()["status_url"]).get_json()["request"])


def refused(settings: Settings, **said: Any) -> dict[str, str]:
    """What a submit with these fields is refused for."""
    body = {name: value for name, value in ({"template": "own", "prompt": "a fox"} | said).items() if value != ""}
    try:
        request, wrong = templates.load(settings).fill(fields.read(GenerateRequest, body))
        submission.check(request, settings.catalogue(), wrong=wrong)
    except InvalidRequest as error:
        return dict(error.errors)
    return {}


def test_it_says_what_the_request_does_not(client: FlaskClient) -> None:
    request = submit(client)
    assert request["prompt"] == "A watercolour of a fox on rough paper."
    assert request["negative_prompt"] == "blur, rough paper torn"
    assert (request["model"], request["width"], request["height"]) == ("base", 768, 1024)
    assert (request["steps"], request["guidance_scale"], request["format"]) == (30, 3.5, "png")
    assert (request["template"], request["quality"]) == ("own", 85)


def test_the_request_goes_before_it(client: FlaskClient) -> None:
    said = {"width": 512, "steps": 5, "format": "webp", "negative_prompt": "text", "guidance_scale": 2.0, "quality": 9}
    request = submit(client, **said, values={"paper": "silk", "more": " at night"})
    assert {name: request[name] for name in said} == said
    assert request["height"] == 1024
    assert request["prompt"] == "A watercolour of a fox on silk at night."


def test_null_is_not_said(client: FlaskClient) -> None:
    assert submit(client, width=None, steps=None)["width"] == 768


def test_a_value_is_put_in_once_and_as_it_is(client: FlaskClient) -> None:
    request = submit(client, prompt="{paper} {", values={"paper": "{prompt}", "more": "\\g<0>{nothing}}"})
    assert request["prompt"] == "A watercolour of {paper} { on {prompt}\\g<0>{nothing}}."


def test_a_blank_value_is_left_out(client: FlaskClient) -> None:
    assert submit(client, values={"paper": " \n", "more": ""})["prompt"] == "A watercolour of a fox on rough paper."


def test_another_model_gets_its_shape_and_nothing_tuned(client: FlaskClient) -> None:
    request = submit(client, model="pico")
    assert (request["model"], request["width"], request["height"]) == ("pico", 192, 256)
    assert (request["steps"], request["guidance_scale"], request["format"]) == (8, 0.0, "png")
    assert request["negative_prompt"] is None, "it would do nothing, and be warned of"
    assert submit(client, model="pico", guidance_scale=2.0)["negative_prompt"] == "blur, rough paper torn"


def test_a_model_that_is_not_served_is_the_fleets_default(write: Write) -> None:
    client = create_app(write(models=("simulated", "pico"))).test_client()
    assert submit(client)["model"] == "simulated"
    (view,) = (view for view in client.get("/api/templates").get_json()["templates"] if view["name"] == "own")
    assert (view["model"], view["width"], view["height"], view["steps"]) == ("simulated", 768, 1024, 8)


def test_a_form_with_pictures_takes_it(client: FlaskClient, worker: FakeWorker) -> None:
    form = {"request": '{"template": "own", "prompt": "a fox"}', "init_image": (io.BytesIO(encoded()), "x.png")}
    answer = client.post("/api/submit", data=form)
    assert answer.status_code == 202, answer.text
    request = client.get(answer.get_json()["status_url"]).get_json()["request"]
    assert (request["width"], request["prompt"]) == (768, "A watercolour of a fox on rough paper.")


@pytest.mark.parametrize(
    ("said", "loc", "says"),
    [
        ({"template": "owl"}, "template", "is not installed here; there are: ancient-style, app-icon"),
        ({"template": "", "values": {"paper": "x"}}, "values", "needs template, whose placeholders it fills"),
        ({"prompt": ""}, "prompt", "is required by template own"),
        ({"values": {"papr": "x"}}, "values.papr", "unknown placeholder; template own has: prompt, values.paper, val"),
        ({"values": {"prompt": "x"}}, "values.prompt", "is what prompt itself says; give it there"),
        ({"values": {"paper": 5}}, "values.paper", "must be a string"),
        ({"values": {"paper": "\ufffd"}}, "values.paper", "contains U+FFFD"),
        ({"values": "x"}, "values", "must be an object"),
        ({"prompt": "x" * 15_980}, "values", "the prompt may have at most 16000, not 16013 characters with them"),
        ({"template": "poster"}, "prompt", "template poster has no place for it; it has: values.product, values.he"),
        ({"template": "poster", "prompt": ""}, "values.product", "is required by template poster"),
        ({"template": "poster", "values": {"product": " "}}, "values.product", "is required by template poster"),
        ({"width": 100}, "width", "must be a multiple of 16 from 256 to 2048 for model base"),
        ({"model": "sdxl"}, "model", "'sdxl' is not served here; choose one of: pico, base"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told_by_its_name(write: Write, said: dict[str, Any], loc: str, says: str) -> None:
    assert refused(write(), **said)[loc].startswith(says)


def test_all_that_is_wrong_is_told_at_once(client: FlaskClient) -> None:
    body = {"template": "poster", "prompt": "x", "width": 1, "steps": 999, "values": {"a": "x", "b": "x"}}
    answer = client.post("/api/submit", json=body)
    assert (answer.status_code, answer.get_json()["code"]) == (422, "invalid_request")
    found = {error["loc"] for error in answer.get_json()["errors"]}
    assert found == {"values.product", "values.a", "values.b", "prompt", "width", "steps"}


def test_the_values_count_for_an_idempotency_key(client: FlaskClient) -> None:
    def send(**values: str) -> tuple[int, Any]:
        body = {"template": "own", "prompt": "x", "values": values}
        answer = client.post("/api/submit", json=body, headers={"Idempotency-Key": "k"})
        return answer.status_code, answer.get_json().get("task_id")

    first = send(paper="silk")
    assert first[0] == 202 and send(paper="silk") == first
    assert send(paper="jute")[0] == send()[0] == 409


def test_a_repeat_is_found_after_the_template_changed(client: FlaskClient, write: Write) -> None:
    def send(client: FlaskClient) -> str:
        body = {"template": "own", "prompt": "x"}
        return str(client.post("/api/submit", json=body, headers={"Idempotency-Key": "k"}).get_json()["task_id"])

    changed = create_app(write(GOOD.replace("A watercolour", "An etching"))).test_client()
    assert send(client) == send(changed)


def test_the_list_shows_what_a_submit_gets(client: FlaskClient) -> None:
    answer = client.get("/api/templates").get_json()["templates"]
    assert [one["name"] for one in answer] == sorted(one["name"] for one in answer)
    (own,) = (TemplateView.model_validate(one) for one in answer if one["name"] == "own")
    assert (own.title.zh, own.description.en) == ("水彩", "Loose brushwork.")
    assert [(part.name, part.default) for part in own.placeholders] == [
        ("prompt", None), ("paper", "rough paper"), ("more", ""),
    ]  # fmt: skip
    assert own.negative_prompt == "blur, {paper} torn" and own.prompt.startswith("A watercolour of {prompt}")
    request = submit(client)
    for field in ("model", "width", "height", "steps", "guidance_scale", "format", "quality"):
        assert getattr(own, field) == request[field]


def test_ones_own_replaces_a_shipped_one_of_its_name(write: Write) -> None:
    shipped = templates.load(load_settings({"models": ("turbo",)}))
    found = templates.load(write(name="poster.toml"))
    assert found["poster"].title.en == "Watercolour"
    assert found.keys() == shipped.keys()


def test_what_is_no_template_is_left_alone(write: Write) -> None:
    settings = write("not toml", "readme.md")
    write("not toml", ".hidden.toml")
    assert "readme" not in templates.load(settings)


def test_a_narrower_model_is_no_mistake_of_the_shipped_ones(write: Write, tmp_path: Path) -> None:
    models_file = tmp_path / "models.toml"
    models_file.write_text("[turbo]\nmax_side = 1024\nmax_pixels = 1048576\n")
    settings = write(models=("turbo",)).model_copy(update={"models_file": models_file})
    (poster,) = (view for view in templates.load(settings).views() if view.name == "poster")
    assert (poster.width, poster.height) == (688, 1024)


@pytest.mark.parametrize(
    ("before", "after", "line", "says"),
    [
        ('model = "base"', 'model = "bass"', 1, "model: 'bass' is in no catalogue; there are: turbo, base, pico"),
        ('model = "base"', "", 1, "model: is required; there are: turbo"),
        ("steps = 30", "step = 30", 4, "step: unknown field; known are title, description, prompt, placeholders"),
        ("steps = 30", "steps = 300", 4, "steps: must be from 1 to 100 for model base"),
        ("steps = 30", 'steps = "30"', 4, "steps: must be an integer"),
        ("steps = 30", "steps 30", 4, "Expected '=' after a key"),
        ("width = 768", "width = 100", 2, "width: must be a multiple of 16 from 256 to 2048 for model base"),
        ("width = 768", "width = 768\nwidth = 768", 3, "Cannot overwrite a value"),
        ('"png"', '"gif"', 7, "format: must be 'webp', 'png' or 'jpeg'"),
        ("on {paper}", "on {papr}", 8, "prompt: {papr} is not declared; add [placeholders.papr]"),
        ("on {paper}", "on {Paper}", 8, "prompt: 'A watercolour of  on {Paper}.': a brace belongs to a placeholder"),
        ("of {prompt}", "of {prompt", 8, "prompt: "),
        ("{more}", "", 20, "placeholders.more: is not used; put {more} into the prompt"),
        ("torn", "{torn}", 6, "negative_prompt: {torn} is not declared"),
        ('zh = "水彩"\n', "", 9, "title.zh: is required"),
        ('zh = "水彩"', 'zh = ""', 11, "title.zh: must not be empty"),
        ('zh = "水彩"', 'zh = "电商海报"', 11, "title.zh: '电商海报' is the title of template poster too; say another"),
        ("[description]", "[subtitle]", 12, "subtitle: unknown field"),
        ('default = "rough paper"', "default = 5", 19, "placeholders.paper.default: must be a string"),
        (
            'default = "rough paper"',
            'standard = "x"',
            19,
            "placeholders.paper.standard: unknown field; known are t",
        ),
        ("\nprompt =", "\nloras = [{name = '../x'}]\nprompt =", 8, "loras.0.name: must be 1 to 64"),
        ('prompt = "A watercolour of {prompt} on {paper}{more}."', "", 1, "prompt: is required"),
    ],
    ids=str,
)
def test_a_mistake_stops_the_start_with_its_file_and_line(
    write: Write, before: str, after: str, line: int, says: str
) -> None:
    assert before in GOOD
    settings = write(GOOD.replace(before, after, 1))
    with pytest.raises(ConfigurationError) as caught:
        templates.load(settings)
    assert settings.templates_dir is not None
    assert caught.value.message.startswith(f"{settings.templates_dir / 'own.toml'}:{line}: {says}")


def test_no_gateway_comes_up_with_a_mistake(write: Write) -> None:
    with pytest.raises(ConfigurationError, match=r"own\.toml:1: model: 'bass'"):
        create_app(write(GOOD.replace("base", "bass")))


def test_the_line_of_a_placeholder_within_many_is_told(write: Write) -> None:
    text = GOOD.replace(
        '"A watercolour of {prompt} on {paper}{more}."', '"""one {prompt}\ntwo {paper}\n{more} {four}"""'
    )
    with pytest.raises(ConfigurationError, match=r"own\.toml:10: prompt: \{four\} is not declared"):
        templates.load(write(text))


def test_a_prompt_that_may_come_to_nothing_is_refused(write: Write) -> None:
    text = GOOD.replace('"A watercolour of {prompt} on {paper}{more}."', '"{more}"').replace("blur", "{prompt}")
    with pytest.raises(ConfigurationError, match=r"own\.toml:8: prompt: must say something"):
        templates.load(write(text))


@pytest.mark.parametrize("name", ["Own.toml", "ö.toml", "a b.toml", "-.toml"])
def test_a_name_that_no_request_could_say_is_refused(write: Write, name: str) -> None:
    with pytest.raises(ConfigurationError, match="its name must be 1 to 64 of a-z 0-9 - _"):
        templates.load(write(name=name))


def test_a_folder_that_is_none_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ZFLEET_TEMPLATES_DIR: .* is no folder"):
        templates.load(settings.model_copy(update={"templates_dir": tmp_path / "none"}))


def test_a_file_is_read_for_the_catalogue_it_is_given(write: Write) -> None:
    folder = write().templates_dir
    assert folder is not None
    assert templates.read(folder / "own.toml", load_catalogue()).request.model == "base"
    with pytest.raises(ConfigurationError, match="in no catalogue; there are: pico"):
        templates.read(folder / "own.toml", load_catalogue().select(["pico"]))
