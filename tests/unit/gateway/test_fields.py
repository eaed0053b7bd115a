from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from common.errors import InvalidRequest, MalformedBody
from common.schemas import GenerateRequest
from gateway import fields


def complaint(raw: str | bytes) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        fields.read_json(GenerateRequest, raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw)
    json.dumps(caught.value.errors).encode()
    return dict(caught.value.errors)


def about(**values: Any) -> dict[str, str]:
    return complaint(json.dumps({"prompt": "x"} | values))


@pytest.mark.parametrize(
    ("values", "loc", "message"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": " \n"}, "prompt", "must not be blank"),
        ({"prompt": "x" * 16_001}, "prompt", "must have at most 16000 characters"),
        ({"prompt": 5}, "prompt", "must be a string"),
        ({"prompt": None}, "prompt", "is required"),
        ({"prompt": "", "template": "t"}, "prompt", "must not be empty"),
        ({"template": 5}, "template", "must be a string"),
        ({"values": {"a": "b\x00"}}, "values.a", "must not contain NUL characters"),
        ({"values": {"a": "x" * 1001}}, "values.a", "must have at most 1000 characters"),
        ({"values": {"a" * 33: "x"}}, "values." + "a" * 33, "must have at most 32 characters"),
        ({"values": {str(i): "" for i in range(17)}}, "values", "must have at most 16 entries"),
        ({"prompt": "a\x00b"}, "prompt", "must not contain NUL characters"),
        ({"prompt": "\ud800"}, "prompt", "must be valid Unicode; this has half of a surrogate pair"),
        ({"width": "64"}, "width", "must be an integer"),
        ({"width": True}, "width", "must be an integer"),
        ({"width": 64.5}, "width", "must be an integer"),
        ({"steps": 0}, "steps", "must be at least 1"),
        ({"seed": -1}, "seed", "must be from 0 to 9007199254740991"),
        ({"seed": "7"}, "seed", "must be an integer from 0 to 9007199254740991"),
        ({"quality": 101}, "quality", "must be from 1 to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "must be a number from 0 to 20"),
        ({"guidance_scale": "much"}, "guidance_scale", "must be a number from 0 to 20"),
        ({"deadline_s": 0}, "deadline_s", "must be above 0 and at most 86400"),
        ({"format": "gif"}, "format", "must be 'webp', 'png' or 'jpeg'"),
        ({"priority": 1}, "priority", "must be 'high', 'normal' or 'low'"),
        ({"metadata": []}, "metadata", "must be an object"),
        ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "must have at most 16 entries"),
    ],
)
def test_a_wrong_field_is_told_with_what_it_may_be(values: dict[str, Any], loc: str, message: str) -> None:
    assert about(**values) == {loc: message}


def test_all_fields_are_told_at_once() -> None:
    assert set(about(prompt="", seed=-1, format="gif")) == {"prompt", "seed", "format"}


def test_a_missing_field_is_required() -> None:
    assert complaint("{}") == {"prompt": "is required"}


def test_an_unknown_field_is_told_with_the_known_ones() -> None:
    assert about(widht=64)["widht"].startswith("unknown field; known are template, values, prompt, negative_prompt")


def test_badly_decoded_text_is_told() -> None:
    assert "U+FFFD" in about(prompt="a \ufffd circle")["prompt"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b"  \n", "the body is empty; send a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'["a"]', "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"prompt": "x"} trailing', "not valid JSON"),
        (b'{"width": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_a_malformed_body(raw: bytes, message: str) -> None:
    with pytest.raises(MalformedBody, match=message) as caught:
        fields.read_json(GenerateRequest, raw)
    assert [loc for loc, _ in caught.value.errors] == ["body"]


def test_the_later_of_two_equal_keys_counts() -> None:
    assert fields.read_json(GenerateRequest, b'{"prompt": "a", "prompt": "b"}').prompt == "b"


def test_names_are_cut_and_made_fit_for_json() -> None:
    (loc,) = complaint('{"prompt": "x", "' + "n" * 5000 + '": 1}')
    assert len(loc) == fields.MAX_LOC_CHARS
    assert complaint('{"prompt": "x", "\\udc00": 1}') == {
        "body": "must be valid Unicode; this has half of a surrogate pair"
    }
    assert "half of a surrogate" in "".join(about(metadata={"\udc00": "1"}).values())


def test_no_more_than_a_few_are_told() -> None:
    assert len(about(**{f"x{i}": 1 for i in range(500)})) == fields.MAX_ERRORS


def test_what_was_sent_is_not_repeated() -> None:
    assert "secret" not in json.dumps(about(prompt=["secret"], format="secret", seed="secret", width="secret"))


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")

    given: int = Field(0, alias="Given-Name", ge=1, lt=5)
    flag: bool = False
    many: list[str] = Field(default_factory=list)


def test_values_are_read_as_json_is() -> None:
    assert fields.read(Sample, {"Given-Name": "3"}).given == 3
    with pytest.raises(InvalidRequest) as caught:
        fields.read(Sample, {"Given-Name": "9", "flag": "x", "many": 1})
    assert dict(caught.value.errors) == {
        "Given-Name": "must be at least 1 and below 5",
        "flag": "must be true or false",
        "many": "must be an array",
    }


def test_a_body_of_nothing_but_wrong_fields_is_refused_without_listing_them() -> None:
    raw = b"{" + b",".join(b'"%d":1' % i for i in range(50_000)) + b"}"
    with pytest.raises(MalformedBody, match="50001 wrong or unknown fields"):
        fields.read_json(GenerateRequest, raw)


@pytest.mark.parametrize(
    ("lora", "loc", "msg"),
    [
        ({"name": "a", "scale": 5}, "loras.0.scale", "must be from -4 to 4"),
        ({"name": "a", "scale": "x"}, "loras.0.scale", "must be a number from -4 to 4"),
        ({"name": "../a"}, "loras.0.name", "must be 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"),
        ({"name": ""}, "loras.0.name", "must be 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"),
        ({"name": "a", "skale": 2}, "loras.0.skale", "unknown field; known are name, scale"),
    ],
)
def test_a_field_within_another_is_told_its_range_too(lora: dict[str, object], loc: str, msg: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        fields.read(GenerateRequest, {"prompt": "x", "loras": [lora]})
    assert raised.value.errors == ((loc, msg),)
