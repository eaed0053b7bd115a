from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from pydantic import BaseModel, Field

from gateway import problems
from gateway.api import Api, Header, Query, TaskPath, json_answer


class Asked(Query):
    size: int = Field(1, ge=1)


class Marked(Header):
    mark: str | None = Field(None, alias="X-Mark")


class Sent(BaseModel):
    text: str


class Seen(BaseModel):
    values: dict[str, Any]


@pytest.fixture
def client() -> FlaskClient:
    api = Api("sample", __name__, about="A sample.")

    @api.post("/all/<task_id>")
    def everything(path: TaskPath, query: Asked, header: Marked, body: Sent) -> Response:
        """Take all there is."""
        return json_answer(
            Seen(values={"id": path.task_id, "size": query.size, "mark": header.mark, "text": body.text})
        )

    @api.get("/none")
    def nothing() -> Response:
        """Take nothing."""
        return json_answer(Seen(values={}), 202, {"X-More": "1"})

    app = Flask(__name__)
    problems.install(app)
    app.register_blueprint(api)
    return app.test_client()


def test_a_view_is_given_what_it_names(client: FlaskClient) -> None:
    answer = client.post("/all/t1?size=3&size=x&other=1", json={"text": "ä"}, headers={"X-Mark": "m"})
    assert answer.get_json() == {"values": {"id": "t1", "size": 3, "mark": "m", "text": "ä"}}


def test_what_is_not_sent_has_its_default(client: FlaskClient) -> None:
    assert client.post("/all/t1?", json={"text": ""}).get_json()["values"] == {
        "id": "t1", "size": 1, "mark": None, "text": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "body", "loc"), [("size=0", {"text": ""}, "size"), ("", {}, "text"), ("", {"text": 1}, "text")]
)
def test_what_is_wrong_is_a_problem(client: FlaskClient, query: str, body: dict[str, Any], loc: str) -> None:
    answer = client.post(f"/all/t1?{query}", json=body)
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.get_json(force=True)["errors"]] == [loc]


def test_an_answer_has_its_length_and_headers(client: FlaskClient) -> None:
    answer = client.get("/none")
    assert (answer.status_code, answer.headers["X-More"], answer.content_type) == (202, "1", "application/json")
    assert answer.content_length == len(answer.data)
    head = client.head("/none")
    assert (head.status_code, head.data, head.content_length) == (202, b"", answer.content_length)
