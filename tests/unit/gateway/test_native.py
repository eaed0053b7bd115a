from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from common.broker import Broker
from common.schemas import SubmitAnswer, TaskPage, TaskView
from gateway.app import TASKS
from gateway.dialects import native
from tests.unit.gateway.fake_worker import FakeWorker

PROMPT = {"prompt": "a red circle"}


def submit(client: FlaskClient, **fields: Any) -> str:
    answer = client.post("/api/submit", json=PROMPT | fields)
    assert answer.status_code == 202, answer.text
    return SubmitAnswer.model_validate_json(answer.data).task_id


def status(client: FlaskClient, task_id: str, wait: float = 0) -> dict[str, Any]:
    answer = client.get(f"/api/status/{task_id}?wait={wait}")
    assert answer.status_code == 200, answer.text
    return TaskView.model_validate_json(answer.data).model_dump(mode="json")


def code(answer: TestResponse) -> tuple[int, str]:
    assert answer.content_type == "application/problem+json"
    return answer.status_code, answer.get_json(force=True)["code"]


# Submit


def test_a_submit_is_accepted_with_where_to_look(client: FlaskClient) -> None:
    answer = client.post("/api/submit", json=PROMPT)
    assert (answer.status_code, answer.content_type) == (202, "application/json")
    sent = answer.get_json()
    task_id = sent["task_id"]
    assert sent == {
        "task_id": task_id,
        "status": "queued",
        "status_url": f"/api/status/{task_id}",
        "events_url": f"/api/tasks/{task_id}/events",
        "cancel_url": f"/api/cancel/{task_id}",
        "position": 0,
        "eta_seconds": None,
    }
    assert answer.headers["Location"] == f"/api/status/{task_id}"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/vnd.x+json", "", None]
)
def test_json_is_read_under_its_own_name_or_none(client: FlaskClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert client.post("/api/submit", data=json.dumps(PROMPT), headers=headers).status_code == 202


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ";"])
def test_what_says_it_is_something_else_is_refused(client: FlaskClient, broker: Broker, kind: str) -> None:
    answer = client.post("/api/submit", data=json.dumps(PROMPT), headers={"Content-Type": kind})
    assert code(answer) == (415, "unsupported_media_type")
    assert broker.pending() == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", (400, "malformed_body")),
        (b"[]", (400, "malformed_body")),
        (b"null", (400, "malformed_body")),
        (b"{'prompt': 1}", (400, "malformed_body")),
        (b'{"prompt": "\xff"}', (400, "malformed_body")),
        (b"[" * 100_000, (400, "malformed_body")),
        (b'{"prompt": "x", "seed": ' + b"1" * 10_000 + b"}", (400, "malformed_body")),
        (b'{"prompt": "x", "seed": ' + b"1" * 4_000 + b"}", (422, "invalid_request")),
        (b'{"prompt": "x", "width": ' + b"1" * 4_000 + b"}", (422, "invalid_request")),
        (b'{"prompt": "x", "n": ' + b"1" * 4_000 + b"}", (422, "invalid_request")),
        (b'{"prompt": "x", "guidance_scale": 1' + b"0" * 400 + b"}", (422, "invalid_request")),
        (b'{"prompt": "x", "guidance_scale": NaN}', (422, "invalid_request")),
        (b'{"prompt": "x", "deadline_s": Infinity}', (422, "invalid_request")),
        (b'{"prompt": "x", "width": -Infinity}', (422, "invalid_request")),
        (b'{"prompt": "\\ud800"}', (422, "invalid_request")),
        (b'{"prompt": "\\u0000"}', (422, "invalid_request")),
        (b'{"prompt": ""}', (422, "invalid_request")),
        (b'{"prompt": "x", "n": true}', (422, "invalid_request")),
        (b'{"prompt": "x", "width": 100}', (422, "invalid_request")),
        (b'{"prompt": "x", "template": "t"}', (422, "invalid_request")),
        (b'{"prompt": "x", "model": "nope"}', (422, "unknown_model")),
        (b'{"prompt": "x", "model": "' + b"m" * 33 + b'"}', (422, "invalid_request")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_body_is_a_problem_with_its_field_and_makes_no_task(
    client: FlaskClient, broker: Broker, body: bytes, expected: tuple[int, str]
) -> None:
    answer = client.post("/api/submit", data=body, content_type="application/json")
    assert code(answer) == expected
    assert answer.get_json(force=True)["errors"][0]["loc"]
    assert broker.pending() == 0


def test_a_long_prompt_in_any_language_is_taken(client: FlaskClient, broker: Broker) -> None:
    prompt = "水墨画 🎨 " * 2_000
    record = broker.view(submit(client, prompt=prompt[:16_000]))
    assert record is not None and record.request.prompt == prompt[:16_000]


def test_a_json_body_has_a_limit_of_its_own_below_the_bodys(client: FlaskClient, broker: Broker) -> None:
    answer = client.post("/api/submit", data=b" " * (32 << 20) + b"{}", content_type="application/json")
    assert code(answer) == (413, "body_too_large")
    assert str(32 << 20) in answer.json["detail"]  # type: ignore[index]
    assert broker.pending() == 0


def test_a_body_over_the_limit_is_told_the_limit(client: FlaskClient, broker: Broker) -> None:
    client.application.config["MAX_CONTENT_LENGTH"] = 2_000
    answer = client.post("/api/submit", json={"prompt": "x" * 3_000})
    assert code(answer) == (413, "body_too_large")
    assert "2000 bytes" in answer.get_json(force=True)["detail"]
    assert broker.pending() == 0


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, "a\x00"])
def test_an_idempotency_key_is_visible_ascii(client: FlaskClient, broker: Broker, key: str) -> None:
    answer = client.post("/api/submit", json=PROMPT, headers={"Idempotency-Key": key})
    assert code(answer) == (422, "invalid_request")
    (error,) = answer.get_json(force=True)["errors"]
    assert error == {"loc": "Idempotency-Key", "msg": "must be 1 to 255 visible ASCII characters"}
    assert broker.pending() == 0


def test_the_same_idempotency_key_is_the_same_task(client: FlaskClient, broker: Broker) -> None:
    headers = {"Idempotency-Key": "~" * 255}
    first, second = (client.post("/api/submit", json=PROMPT, headers=headers).get_json() for _ in range(2))
    assert first == second
    other = client.post("/api/submit", json={"prompt": "other"}, headers=headers)
    assert code(other) == (409, "idempotency_conflict")
    assert broker.pending() == 1


# Status


def test_a_queued_task(client: FlaskClient) -> None:
    submit(client)
    task_id = submit(client, seed=7, steps=4, metadata={"k": "v"})
    seen = status(client, task_id)
    assert (seen["task_id"], seen["status"], seen["model"], seen["position"]) == (task_id, "queued", "simulated", 1)
    assert seen["progress"] == {"step": 0, "steps": 4, "preview": None}
    assert (seen["attempts"], seen["images"], seen["error"], seen["warnings"]) == ([], [], None, [])
    assert (seen["timings"]["queued_ms"], seen["timings"]["total_ms"]) == (None, None)
    assert (seen["started_at"], seen["finished_at"], seen["expires_at"]) == (None, None, None)
    assert datetime.fromisoformat(seen["created_at"]).tzinfo is not None
    assert (seen["request"]["seed"], seen["request"]["metadata"]) == (7, {"k": "v"})


def test_a_running_task(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client, steps=4)
    (task,) = worker.take()
    worker.step(task, 3)
    seen = status(client, task_id)
    assert (seen["status"], seen["progress"], seen["position"]) == (
        "running",
        {"step": 3, "steps": 4, "preview": None},
        None,
    )
    (attempt,) = seen["attempts"]
    assert (attempt["worker"], attempt["gpu"]) == ("w1", "H200")
    assert (attempt["outcome"], attempt["ended_at"]) == ("running", None)
    assert seen["timings"]["queued_ms"] >= 0 and seen["timings"]["total_ms"] is None


def test_a_succeeded_task(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client, n=2, format="png", seed=5)
    worker.work()
    seen = status(client, task_id, wait=30)
    assert (seen["status"], seen["eta_seconds"]) == ("succeeded", None)
    assert [image["url"] for image in seen["images"]] == [f"/view/{task_id}/0.png", f"/view/{task_id}/1.png"]
    assert [image["seed"] for image in seen["images"]] == [5, 6]
    assert "key" not in seen["images"][0]
    assert seen["timings"]["total_ms"] >= seen["timings"]["queued_ms"]
    assert seen["expires_at"] > seen["finished_at"]


def test_a_failed_task(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client)
    (task,) = worker.take()
    worker.fail(task)
    seen = status(client, task_id)
    assert seen["status"] == "failed"
    assert seen["error"] == {"code": "pipeline_failed", "message": "no picture came of it", "retryable": False}
    assert seen["attempts"][0]["outcome"] == "failed"


def test_a_status_is_never_kept(client: FlaskClient) -> None:
    assert client.get(f"/api/status/{submit(client)}").headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("wait", ["-1", "61", "x", "nan", "inf", "1e99", "", "0x1", "1" * 5000, "%00", "%ff"])
def test_a_bad_wait_is_told_its_range(client: FlaskClient, wait: str) -> None:
    answer = client.get(f"/api/status/{submit(client)}?wait={wait}")
    assert code(answer) == (422, "invalid_request")
    (error,) = answer.get_json(force=True)["errors"]
    assert error["loc"] == "wait" and error["msg"].endswith("from 0 to 60")


@pytest.mark.parametrize(
    "task_id", ["x", "0" * 32, "%00", "%2e%2e", "a%0ab", "x" * 5000, "%f0%9f%8e%a8", "*", "%ff", "a b"]
)
def test_no_such_task(client: FlaskClient, task_id: str) -> None:
    assert code(client.get(f"/api/status/{task_id}")) == (404, "unknown_task")
    assert code(client.get(f"/api/status/{task_id}?wait=1")) == (404, "unknown_task")
    assert code(client.post(f"/api/cancel/{task_id}")) == (404, "unknown_task")
    assert code(client.get(f"/api/tasks/{task_id}/events")) == (404, "unknown_task")


# Cancel


def test_a_queued_task_is_canceled_once(client: FlaskClient) -> None:
    task_id = submit(client)
    answer = client.post(f"/api/cancel/{task_id}")
    assert (answer.status_code, answer.get_json()["status"]) == (200, "canceled")
    assert code(client.post(f"/api/cancel/{task_id}")) == (409, "already_final")


def test_canceling_takes_a_post(client: FlaskClient) -> None:
    answer = client.get(f"/api/cancel/{submit(client)}")
    assert code(answer) == (405, "method_not_allowed")
    assert "POST" in answer.headers["Allow"]


# List


def test_a_list_is_paged_newest_first(client: FlaskClient) -> None:
    ids = [submit(client) for _ in range(5)]
    seen: list[str] = []
    cursor = ""
    for _ in range(3):
        answer = client.get("/api/tasks?limit=2" + (f"&cursor={cursor}" if cursor else ""))
        page = TaskPage.model_validate_json(answer.data)
        seen += [task.task_id for task in page.tasks]
        cursor = page.next_cursor or ""
    assert set(seen) == set(ids) and len(seen) == 5 and not cursor
    assert client.get("/api/tasks").get_json()["tasks"][0]["created_at"] >= page.tasks[-1].created_at.isoformat()


def test_a_list_can_be_of_one_state(client: FlaskClient, worker: FakeWorker) -> None:
    done, _waiting = submit(client), submit(client)
    worker.work()
    tasks = client.get("/api/tasks?status=succeeded").get_json()["tasks"]
    assert [task["task_id"] for task in tasks] == [done]
    assert client.get("/api/tasks?status=failed").get_json() == {"tasks": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("query", "loc"),
    [
        ("limit=0", "limit"), ("limit=201", "limit"), ("limit=x", "limit"), ("limit=", "limit"), ("limit=1.5", "limit"),
        ("limit=" + "9" * 5000, "limit"), ("status=done", "status"), ("status=", "status"), ("cursor=", "cursor"),
        ("cursor=x", "cursor"), ("cursor=%ff", "cursor"), ("cursor=" + "A" * 5000, "cursor"), ("cursor=*", "cursor"),
        ("cursor=" + base64.urlsafe_b64encode(b"5:../x").decode(), "cursor"),
        ("cursor=" + base64.urlsafe_b64encode("٣:x".encode()).decode(), "cursor"),
    ],
)  # fmt: skip
def test_a_bad_query_is_told_its_field(client: FlaskClient, query: str, loc: str) -> None:
    answer = client.get(f"/api/tasks?{query}")
    assert code(answer) == (422, "invalid_request")
    assert [error["loc"] for error in answer.get_json(force=True)["errors"]] == [loc]


def test_unknown_parameters_are_ignored_and_the_first_of_several_counts(client: FlaskClient) -> None:
    assert client.get("/api/tasks?limit=1&limit=x&_=17").status_code == 200


@pytest.mark.parametrize("place", [(0, "a"), (1790000000123, "0" * 32), (5, "A_-z")])
def test_a_cursor_comes_back_as_the_place_it_was(place: tuple[int, str]) -> None:
    cursor = native.render_cursor(place)
    assert native.parse_cursor(cursor) == place
    assert cursor.replace("-", "").replace("_", "").isalnum()


# Events


def events(client: FlaskClient, task_id: str) -> list[tuple[str, Any]]:
    answer = client.get(f"/api/tasks/{task_id}/events")
    assert answer.status_code == 200
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]


def test_the_events_of_a_final_task(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client)
    worker.work()
    (first, snapshot), (last, final) = events(client, task_id)
    assert (first, last) == ("status", "succeeded")
    assert snapshot == final == status(client, task_id)


def test_a_stream_is_sent_as_it_comes(client: FlaskClient) -> None:
    task_id = submit(client)
    client.post(f"/api/cancel/{task_id}")
    answer = client.get(f"/api/tasks/{task_id}/events")
    assert answer.mimetype == "text/event-stream"
    assert (answer.headers["X-Accel-Buffering"], answer.headers["Cache-Control"]) == ("no", "no-store")
    assert "Content-Length" not in answer.headers


def test_whoever_saw_the_end_is_told_not_to_come_back(client: FlaskClient) -> None:
    task_id = submit(client)
    client.post(f"/api/cancel/{task_id}")
    assert "\nid: 0.canceled.0\n" in client.get(f"/api/tasks/{task_id}/events").text
    answer = client.get(f"/api/tasks/{task_id}/events", headers={"Last-Event-ID": "0.canceled.0"})
    assert (answer.status_code, answer.data) == (204, b"")


def test_a_stream_nobody_reads_is_forgotten(client: FlaskClient) -> None:
    task_id = submit(client)
    assert client.head(f"/api/tasks/{task_id}/events").status_code == 200
    assert client.application.extensions[TASKS]._hub._count == 0


def test_a_stream_says_when_to_come_back_and_not_to_all_the_same() -> None:
    hints = {next(native.render_events(iter([]))) for _ in range(50)}
    assert len(hints) > 10
    for hint in hints:
        assert 1000 <= int(hint.removeprefix("retry: ")) <= 3000


def test_silence_is_a_comment() -> None:
    assert list(native.render_events(iter([None])))[1:] == [": still here\n\n"]


def test_a_list_says_what_was_asked_for_and_what_came_of_it(client: FlaskClient, worker: FakeWorker) -> None:
    prompt = "a red circle, " * 20
    client.post("/api/submit", json={"prompt": prompt, "n": 3})
    done = worker.work()
    client.post("/api/submit", json={"prompt": "短", "model": "pico"})
    waits, succeeded = client.get("/api/tasks").get_json()["tasks"]
    assert succeeded == succeeded | {
        "task_id": done, "model": "simulated", "prompt": prompt[:120], "n": 3, "images": 3, "retry_of": None,
        "thumbnail_url": f"/api/tasks/{done}/thumbnail",
    }  # fmt: skip
    assert waits == waits | {
        "model": "pico",
        "prompt": "短",
        "n": 1,
        "images": 0,
        "thumbnail_url": None,
        "error_code": None,
    }


def test_a_list_says_why_a_task_failed(client: FlaskClient, worker: FakeWorker) -> None:
    submit(client)
    (task,) = worker.take()
    worker.fail(task)
    (failed,) = client.get("/api/tasks").get_json()["tasks"]
    assert (failed["status"], failed["error_code"]) == ("failed", "pipeline_failed")


def test_a_list_of_one_model(client: FlaskClient) -> None:
    ids = [
        client.post("/api/submit", json={"prompt": "x", "model": model}).get_json()["task_id"]
        for model in ("pico", "simulated", "pico")
    ]
    first = client.get("/api/tasks?model=pico&limit=1").get_json()
    rest = client.get(f"/api/tasks?model=pico&cursor={first['next_cursor']}").get_json()
    assert [task["task_id"] for task in first["tasks"] + rest["tasks"]] == [ids[2], ids[0]]
    assert client.get("/api/tasks?model=other").get_json() == {"tasks": [], "next_cursor": None}
