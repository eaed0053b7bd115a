"""What every shipped prompt template keeps to, whatever is said for its placeholders."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models import load_catalogue
from common.schemas import GenerateRequest, ResolvedRequest
from common.settings import load_settings
from common.templates import PLACEHOLDER, PROMPT
from gateway import submission, templates

NAMES = sorted(path.stem for path in templates.SHIPPED.glob("*.toml"))
LEAST = {"poster", "ancient-style", "product-on-white", "avatar"}
TOKENS = 512  # of Z-Image's text encoder; a Chinese character is about one, an English word about 1.3

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufffd"), min_size=1, max_size=60)
VALUES = WORDS.filter(lambda text: bool(text.strip())) | st.sampled_from(
    ["{prompt}", "{product} {", "}", "茶", "\\1 %s"]
)


@functools.cache
def served(*models: str) -> templates.Templates:
    return templates.load(load_settings({"models": models}))


def resolved(name: str, models: tuple[str, ...] = ("turbo",), **fields: object) -> ResolvedRequest:
    found = served(*models)
    request, wrong = found.fill(GenerateRequest.model_validate({"template": name} | fields))
    spec = submission.check(request, load_catalogue().select(models), wrong=wrong)
    return submission.resolve(request, spec)


def given_by(name: str, text: str = "x") -> dict[str, object]:
    """The fields of a request that gives every placeholder the same text."""
    placeholders = served("turbo")[name].placeholders
    prompt = {PROMPT: text} if PROMPT in placeholders else {}
    return {"values": {one: text for one in placeholders if one != PROMPT}, **prompt}


def test_those_that_are_promised_are_there() -> None:
    assert set(NAMES) >= LEAST and len(NAMES) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_it_is_told_in_two_languages(name: str) -> None:
    template = served("turbo")[name]
    for words in (template.title, template.description, *(one.title for one in template.placeholders.values())):
        assert re.search(r"[\u4e00-\u9fff]", words.zh) and not re.search(r"[\u4e00-\u9fff]", words.en)


@pytest.mark.parametrize("name", NAMES)
def test_its_prompt_is_one_paragraph_that_the_model_reads_whole(name: str) -> None:
    template = served("turbo")[name]
    fields = {one: part.default or "word " * 20 for one, part in template.placeholders.items()}
    text = PLACEHOLDER.sub(lambda match: fields[match[1]], template.prompt)
    chinese = len(re.findall(r"[\u3000-\u9fff\uff00-\uffef]", text))
    english = len(re.findall(r"[A-Za-z0-9]+|[^\w\s]", text))
    assert chinese + 1.3 * english < TOKENS
    assert text == text.strip() and "\n" not in text and "  " not in text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_is_said_stands_in_the_prompt_as_it_is(name: str, data: st.DataObject) -> None:
    template = served("turbo")[name]
    values = {one: data.draw(VALUES, label=one) for one in template.placeholders}
    prompt = {PROMPT: values[PROMPT]} if PROMPT in values else {}
    own = {one: text for one, text in values.items() if one != PROMPT}
    request = resolved(name, values=own, **prompt)
    parts = PLACEHOLDER.split(template.prompt)  # text, name, text, name, … text
    expected = "".join(values[part] if index % 2 else part for index, part in enumerate(parts))
    assert request.prompt == expected
    assert (request.template, request.width, request.height) == (name, template.request.width, template.request.height)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_default_may_be_left_out(name: str) -> None:
    needed = {one for one, part in served("turbo")[name].placeholders.items() if part.default is None}
    request = resolved(
        name,
        values={one: "x" for one in needed if one != PROMPT},
        **({PROMPT: "x"} if PROMPT in needed else {}),
    )
    assert not re.search(r"[{}]", request.prompt)


@pytest.mark.parametrize("models", [("pico",), ("simulated",), ("base", "turbo"), ("pico", "base")], ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_every_fleet_takes_it(name: str, models: tuple[str, ...]) -> None:
    request = resolved(name, models, **given_by(name))
    (view,) = (view for view in served(*models).views() if view.name == name)
    assert request.model == view.model == ("turbo" if "turbo" in models else models[0])
    shown = view.model_dump(exclude={"name", "title", "description", "placeholders", "prompt"}, mode="json")
    assert {field: request.model_dump(mode="json")[field] for field in shown} == shown
    shape = served("turbo")[name].request
    assert shape.width and shape.height
    assert request.width / request.height == pytest.approx(shape.width / shape.height, rel=0.1)


def test_the_folder_holds_nothing_else() -> None:
    assert all(re.fullmatch(r"[a-z-]+\.toml", path.name) for path in Path(templates.SHIPPED).iterdir())
