from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.schemas import GenerateRequest
from gateway import problems


@pytest.fixture
def description(client: FlaskClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").get_json())


def values(node: object, key: str) -> Iterator[Any]:
    """Every value of `key` at any depth."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for child in node.values():
            yield from values(child, key)
    if isinstance(node, list):
        for child in node:
            yield from values(child, key)


def test_every_route_is_described(app: OpenAPI, description: dict[str, Any]) -> None:
    routes = {
        (re.sub("<([^>]+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.startswith(("docs.", "dashboard."))
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, calls in description["paths"].items() for method in calls}
    assert routes == described


def test_every_call_has_a_summary_an_answer_and_problems(description: dict[str, Any]) -> None:
    for calls in description["paths"].values():
        for call in calls.values():
            assert call["summary"]
            assert "default" in call["responses"]
            for status, answer in call["responses"].items():
                content = answer.get("content", {})
                if not status.isdigit() or int(status) >= 400:
                    assert set(content) <= {"application/problem+json", "application/json"}, call
            assert any(status.startswith("2") for status in call["responses"])


PUBLIC = {"/health", "/ready", "/live"}
LINKED = {"/view/{task_id}/{name}"}  # a signed link does for a key
OPERATORS = {
    "/api/workers",
    "/metrics",
    "/api/history",
    "/api/fleet",
    "/api/fleet/events",
    "/api/fleet/pause",
    "/api/fleet/resume",
    "/api/workers/{name}/drain",
    "/api/workers/{name}/resume",
    "/api/workers/{name}/restart",
    "/api/failed/requeue",
    "/api/failed/purge",
    "/api/keys",
    "/api/keys/{key_id}/revoke",
    "/api/keys/{key_id}/rotate",
}
HEADERS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}


def test_every_call_says_which_key_it_wants_and_what_comes_without(description: dict[str, Any]) -> None:
    schemes = description["components"]["securitySchemes"]
    assert schemes["bearer"] | {"bearerFormat": ""} == {"type": "http", "scheme": "bearer", "bearerFormat": ""}
    assert schemes["api_key"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    for path, calls in description["paths"].items():
        for call in calls.values():
            answers = set(call["responses"])
            assert answers >= {"400", "414", "431"}
            assert ("413" in answers) == ("408" in answers) == ("requestBody" in call)
            if path in PUBLIC | LINKED:
                assert "security" not in call and ("401" in answers) == (path in LINKED)
                continue
            scopes = ["admin"] if path in OPERATORS else []
            assert call["security"] == [{"bearer": scopes}, {"api_key": scopes}]
            assert answers >= {"401", "403", "503"}


def test_a_status_is_described_with_all_its_codes_and_headers(description: dict[str, Any]) -> None:
    submit = description["paths"]["/api/submit"]["post"]["responses"]
    assert submit["400"]["description"] == "bad_request, malformed_body"
    assert submit["503"]["description"].split(", ")[0] == "redis_unavailable", "said once, though two parts say it"
    assert submit["503"]["description"].count("redis_unavailable") == 1
    for status, header in HEADERS.items():
        assert submit[status]["headers"][header]["required"]
    assert "headers" not in submit["422"]


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    assert all(isinstance(part, dict) for part in description["components"].values())
    for reference in values(description, "$ref"):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_the_schemas_are_the_ones_in_use(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    assert {"GenerateRequest", "TaskView", "SubmitAnswer", "Problem", "Health", "TaskPage"} <= set(schemas)
    assert schemas["GenerateRequest"]["properties"]["prompt"]["maxLength"] == 16_000
    submit = description["paths"]["/api/submit"]["post"]
    assert submit["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateRequest")
    assert [parameter["name"] for parameter in submit["parameters"]] == ["Idempotency-Key"]
    problem = {"$ref": "#/components/schemas/Problem"}
    assert submit["responses"]["422"]["content"] == {"application/problem+json": {"schema": problem}}
    assert set(submit["responses"]) >= {"202", "400", "409", "415", "422", "429", "503"}


def test_the_page_comes_whole_from_here(client: FlaskClient) -> None:
    page = client.get("/docs")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "//" not in re.sub("<!--.*?-->", "", page.text)
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 4
    for link in links:
        assert client.get(f"/{link}").status_code == 200, link
    start = client.get("/docs/start.js").text
    assert 'url: "openapi.json"' in start and "validatorUrl: null" in start


def test_the_description_is_json_and_drawn_once(client: FlaskClient) -> None:
    one, two = client.get("/openapi.json"), client.get("/openapi.json")
    assert one.data == two.data
    assert json.loads(one.data)["openapi"].startswith("3.1")


@pytest.mark.parametrize(
    "path", ["/docs/", "/docs/assets/../../x", "/docs/assets/%2e%2e/__init__.py", "/openapi", "/web/", "/web/../app.py"]
)
def test_nothing_else_is_there(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


def test_the_guide_names_every_field_call_and_code(description: dict[str, Any]) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "api.md").read_text("utf-8")
    for field in GenerateRequest.model_fields:
        assert f"`{field}`" in guide
    for code in [*problems.KINDS, *(code for code, _ in problems.HTTP_CODES.values())]:
        assert f"`{code}`" in guide
    for path in description["paths"]:
        assert re.sub(r"(view.*)\{name\}", r"\1<k>.<format>", path).replace("{", "<").replace("}", ">") in guide
