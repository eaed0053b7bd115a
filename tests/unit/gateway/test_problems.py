from __future__ import annotations

import json

import pytest
from flask import Blueprint, Flask, Response, abort, request
from flask.testing import FlaskClient
from pydantic import ValidationError
from structlog.testing import capture_logs

from common import errors
from common.errors import FleetError, InvalidRequest, QueueFull, RedisUnavailable, UnknownTask
from common.problem import Problem
from common.schemas import GenerateRequest
from gateway import problems
from gateway.requestlog import RequestLog


def raiser(error: Exception) -> FlaskClient:
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1000
    app.wsgi_app = RequestLog(app.wsgi_app)  # type: ignore[method-assign]
    problems.install(app)

    @app.route("/", methods=["GET", "POST"])
    def view() -> str:
        raise error

    @app.post("/read")
    def read() -> str:
        return str(len(request.get_data()))

    @app.get("/abort")
    def give_up() -> str:
        abort(Response("as it is", 418))

    return app.test_client()


def problem(answer: object) -> Problem:
    assert isinstance(answer, Response)
    assert answer.content_type == problems.MEDIA_TYPE
    assert answer.headers["Cache-Control"] == "no-store"
    found = Problem.model_validate_json(answer.data)
    assert found.status == answer.status_code
    assert found.type == f"urn:zfleet:problem:{found.code}"
    return found


def raised_here(kind: type[FleetError]) -> bool:
    """Whether a gateway can come to raise this; the others are a worker's or the command line's."""
    workers = {"ModelLoadFailed", "PipelineFailed", "LoraUnusable", "OutOfMemory", "DeviceFailed", "InputGone"}
    return kind.__name__ not in workers | {"FleetError", "ClientError", "ConfigurationError"}


def every_kind() -> list[type[FleetError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FleetError)]
    return [kind for kind in kinds if raised_here(kind)]


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.code)
def test_every_error_of_the_gateways_has_its_status(kind: type[FleetError]) -> None:
    answer = raiser(kind("what went wrong")).get("/")
    found = problem(answer)
    assert (found.code, found.detail) == (kind.code, "what went wrong")
    assert 400 <= answer.status_code < 500 or answer.status_code in (503, 504)
    assert kind.retryable == ("Retry-After" in answer.headers)


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequest("x"), 422), (UnknownTask("x"), 404), (QueueFull("x"), 429), (RedisUnavailable("x"), 503)],
)
def test_the_statuses_that_are_promised(error: FleetError, status: int) -> None:
    assert raiser(error).get("/").status_code == status


def test_the_refused_fields_are_named() -> None:
    found = problem(raiser(InvalidRequest.field("width", "must be even")).get("/"))
    assert [(field.loc, field.msg) for field in found.errors] == [("width", "must be even")]
    assert found.detail == "width: must be even"


def test_what_nobody_foresaw_is_told_as_no_more_than_that_and_logged_without_what_was_sent() -> None:
    sent = {"prompt": ["a " + "terces"[::-1]]}
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate(sent)
    with capture_logs() as logs:
        answer = raiser(caught.value).get("/", headers={"X-Request-ID": "r-1"})
    assert (answer.status_code, problem(answer).code) == (500, "internal")
    assert "r-1" in problem(answer).detail
    (line,) = [line for line in logs if line["event"] == "request_failed"]
    assert (line["request_id"], line["error"]) == ("r-1", "ValidationError")
    assert "in view" in line["traceback"]
    assert "secret" not in json.dumps(logs) + answer.text


def test_an_error_of_a_workers_kind_is_an_internal_one_here() -> None:
    assert problem(raiser(errors.PipelineFailed("details")).get("/")).detail.startswith("something went wrong")


def test_werkzeugs_own_errors_are_problems_too() -> None:
    client = raiser(ValueError())
    assert problem(client.get("/nowhere")).code == "not_found"
    refused = client.put("/")
    assert problem(refused).code == "method_not_allowed"
    assert set(refused.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
    assert problem(client.post("/read", data=b"x" * 1001)).detail == "the body is larger than 1000 bytes"
    assert client.post("/read", data=b"x" * 1000).text == "1000"
    assert problem(client.get("/", headers={"Host": "a b"})).status == 500  # the view's own; the host is not asked


def test_a_finished_answer_is_left_alone() -> None:
    assert raiser(ValueError()).get("/abort").text == "as it is"


def test_a_dialect_can_give_errors_its_own_form() -> None:
    app = Flask(__name__)
    app.wsgi_app = RequestLog(app.wsgi_app)  # type: ignore[method-assign]
    problems.install(app)
    blueprint = Blueprint("other", __name__, url_prefix="/other")

    @blueprint.get("/")
    def view() -> str:
        raise QueueFull("later")

    def render(answer: problems.Answer) -> Response:
        return Response(json.dumps({"error": answer.problem.detail}), answer.problem.status, dict(answer.headers))

    problems.install(blueprint, render)
    app.register_blueprint(blueprint)
    answer = app.test_client().get("/other/")
    assert (answer.status_code, answer.get_json(force=True)) == (429, {"error": "later"})
    assert answer.headers["Retry-After"] == "5"


def test_the_description_lists_the_codes_of_a_status() -> None:
    described = problems.documented(InvalidRequest, errors.UnknownModel, UnknownTask)
    assert described["422"]["description"] == "invalid_request, unknown_model"  # type: ignore[index]
    assert set(described) == {"422", "404"}
