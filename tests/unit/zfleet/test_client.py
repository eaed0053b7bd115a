from __future__ import annotations

import time
from pathlib import Path

import pytest

from common.errors import ClientError, ConfigurationError
from common.schemas import TaskView
from tests.servers import free_port
from tests.unit.zfleet.stub import PIXELS, TASK, Reply, StubGateway, accepted, problem, view
from zfleet.client import FIRST_CONTACT_S, Client, NotInTime, Refused, TaskFailed, Unreachable
from zfleet.pictures import CannotRead


def test_submit_sends_the_fields_that_were_given_and_a_key() -> None:
    with StubGateway(accepted()) as stub, Client(stub.url) as client:
        answer = client.submit("a cat", width=64, seed=None, negative_prompt="")
    assert answer.task_id == TASK
    assert stub.asked[0].path == "/api/submit"
    assert stub.asked[0].body == {"prompt": "a cat", "width": 64, "negative_prompt": ""}
    assert len(stub.asked[0].headers["Idempotency-Key"]) >= 32


def test_a_submit_whose_answer_got_lost_is_sent_again_under_the_same_key() -> None:
    with StubGateway(Reply(drop=True), Reply(drop=True), accepted()) as stub, Client(stub.url) as client:
        client.submit("a cat")
    assert len({asked.headers["Idempotency-Key"] for asked in stub.asked}) == 1
    assert len(stub.asked) == 3


def test_pictures_that_are_files_go_along_as_a_form(tmp_path: Path) -> None:
    one, two = tmp_path / "ein Bild.png", tmp_path / "b.webp"
    one.write_bytes(b"one")
    two.write_bytes(b"two" * 100_000)
    with StubGateway(Reply(drop=True), accepted()) as stub, Client(stub.url) as client:
        handle = f"img_{'0' * 32}"
        client.submit("a cat", init_image=one, mask_image=handle, reference_images=[two, handle, one], seed=None)
    assert (
        stub.asked[1].body
        == stub.asked[0].body
        == {
            "request": {"prompt": "a cat", "mask_image": handle, "reference_images": [handle]},
            "init_image": [("ein Bild.png", b"one")],
            "reference_images": [("b.webp", b"two" * 100_000), ("ein Bild.png", b"one")],
        }
    )
    assert len({asked.headers["Idempotency-Key"] for asked in stub.asked}) == 1


def test_pictures_that_are_no_files_stay_in_the_json() -> None:
    with StubGateway(accepted()) as stub, Client(stub.url) as client:
        client.submit("a cat", init_image="aGVsbG8=", reference_images=("a", "b"))
    assert stub.asked[0].body == {"prompt": "a cat", "init_image": "aGVsbG8=", "reference_images": ["a", "b"]}


def test_an_upload_gives_a_handle(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    sent = {
        "handle": "img_1", "width": 4, "height": 3, "format": "png", "bytes": 3, "expires_at": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    with StubGateway(Reply(status=201, body=sent)) as stub, Client(stub.url) as client:
        assert client.upload(tmp_path / "a.png").handle == "img_1"
    assert (stub.asked[0].path, stub.asked[0].body) == ("/api/images", {"image": [("a.png", b"one")]})


@pytest.mark.parametrize(("name", "says"), [("none.png", "no such file"), (".", "is a directory")])
def test_a_file_that_cannot_be_read_is_told_before_anything_is_sent(tmp_path: Path, name: str, says: str) -> None:
    with StubGateway(accepted()) as stub, Client(stub.url) as client:
        for call in (lambda: client.upload(tmp_path / name), lambda: client.submit("x", init_image=tmp_path / name)):
            with pytest.raises(CannotRead, match=says) as caught:
                call()
            assert str(tmp_path / name) in caught.value.message
    assert stub.asked == []


def test_two_submits_have_two_keys() -> None:
    with StubGateway(accepted()) as stub, Client(stub.url) as client:
        client.submit("a cat")
        client.submit("a cat")
    assert len({asked.headers["Idempotency-Key"] for asked in stub.asked}) == 2


def test_a_url_with_a_path_is_kept() -> None:
    with StubGateway(accepted()) as stub, Client(stub.url + "/zimage/") as client:
        client.submit("a cat")
    assert stub.asked[0].path == "/zimage/api/submit"


def test_retry_after_is_honoured() -> None:
    full = problem(429, "queue_full", headers={"Retry-After": "1"})
    with StubGateway(full, accepted()) as stub, Client(stub.url) as client:
        began = time.monotonic()
        client.submit("a cat")
        assert 1.0 <= time.monotonic() - began < 5.0


def test_the_time_out_ends_the_tries() -> None:
    full = problem(503, "redis_unavailable", "Redis is away", headers={"Retry-After": "2"})
    with StubGateway(full) as stub, Client(stub.url, timeout_s=1.0) as client:
        began = time.monotonic()
        with pytest.raises(Refused, match="Redis is away") as caught:
            client.submit("a cat")
        assert time.monotonic() - began < 2.0, "it did not wait as long as it was told"
    assert caught.value.code == "redis_unavailable"
    assert len(stub.asked) == 1


def test_a_refusal_carries_the_problem() -> None:
    refusal = problem(422, "invalid_request", "width: too odd", errors=[{"loc": "width", "msg": "too odd"}])
    with (
        StubGateway(refusal) as stub,
        Client(stub.url) as client,
        pytest.raises(Refused, match="width: too odd") as caught,
    ):
        client.submit("a cat", width=63)
    error = caught.value
    assert isinstance(error, ClientError)
    assert (error.code, error.errors[0].loc, error.errors[0].msg) == ("invalid_request", "width", "too odd")
    assert len(stub.asked) == 1, "a refusal that no retry can help is not retried"
    assert Refused.code == "client_error"


def test_where_nothing_listens_the_answer_is_quick_and_says_so() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with Client(url) as client, pytest.raises(Unreachable, match="connection refused"):
        client.queue()
    assert time.monotonic() - began < FIRST_CONTACT_S + 1


def test_a_gateway_that_was_there_is_waited_for_longer_than_one_never_seen() -> None:
    with StubGateway(Reply(drop=True)) as stub, Client(stub.url, timeout_s=2.0) as client:
        with pytest.raises(Unreachable):
            client.queue()
        stranger = len(stub.asked)
        stub.replies.append(accepted())
        stub.replies.popleft()
        client.submit("a cat")
        stub.replies.append(Reply(drop=True))
        stub.replies.popleft()
        stub.asked.clear()
        with pytest.raises(Unreachable):
            client.queue()
        assert len(stub.asked) > stranger


def test_cancel_is_not_repeated_when_its_answer_got_lost() -> None:
    with StubGateway(Reply(drop=True), view("canceled")) as stub, Client(stub.url) as client:
        with pytest.raises(Unreachable):
            client.cancel(TASK)
        assert client.cancel(TASK).status == "canceled"


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://", "", "127.0.0.1:8080"])
def test_a_url_that_is_none_is_a_mistake(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a gateway's URL"):
        Client(url)


@pytest.mark.parametrize(
    "reply", [Reply(body="<html>"), Reply(body=b"<html>hello"), Reply(body={"a": 1}), Reply(body=[])]
)
def test_another_kind_of_server_is_told_from_a_gateway(reply: Reply) -> None:
    with StubGateway(reply) as stub, Client(stub.url) as client:
        for call in (lambda: client.status(TASK), client.queue, client.workers, client.models, client.health):
            with pytest.raises(Refused, match=r"does not answer as a zfleet gateway does \(200 OK"):
                call()


def test_a_proxy_without_its_gateway_is_tried_again() -> None:
    with StubGateway(Reply(status=502, body=b"<html>Bad Gateway"), view("running")) as stub, Client(stub.url) as client:
        assert client.status(TASK).status == "running"


def test_fields_of_a_newer_gateway_are_no_error() -> None:
    with StubGateway(view("running", brand_new=1)) as stub, Client(stub.url) as client:
        assert client.status(TASK).status == "running"


def test_a_task_id_cannot_leave_its_place_in_the_path() -> None:
    with StubGateway(problem(404, "unknown_task")) as stub, Client(stub.url) as client:
        for task_id in ("../health", "a/b", "a?wait=1", "", "ä b"):
            with pytest.raises(Refused):
                client.status(task_id)
    assert all(asked.path.startswith("/api/status/") and asked.path.count("/") == 3 for asked in stub.asked)
    assert not any("?" in asked.path for asked in stub.asked)


def test_wait_polls_long_without_a_callback() -> None:
    with StubGateway(view("queued"), view("succeeded")) as stub, Client(stub.url) as client:
        assert client.wait(TASK).status == "succeeded"
    assert [asked.path for asked in stub.asked] == [f"/api/status/{TASK}?wait=30"] * 2


def test_wait_asks_less_often_while_nothing_changes_and_sooner_again_after() -> None:
    replies = [view("queued")] * 8 + [view("running", 1), view("running", 2), view("succeeded", 4)]
    seen: list[TaskView] = []
    with StubGateway(*replies) as stub, Client(stub.url) as client:
        client.wait(TASK, on_progress=seen.append)
    waits = [float(asked.path.partition("wait=")[2]) for asked in stub.asked]
    assert waits[0] == 0.2
    assert waits[1:8] == sorted(waits[1:8])
    assert max(waits) == 2.0
    assert waits[-1] == 0.2
    assert [view.progress.step for view in seen] == [0] * 8 + [1, 2, 4]


def test_wait_gives_up_in_time_with_the_last_status() -> None:
    with (
        StubGateway(view("running", 3)) as stub,
        Client(stub.url) as client,
        pytest.raises(NotInTime, match=r"still running after 0\.2 s") as caught,
    ):
        client.wait(TASK, 0.2)
    assert caught.value.view.progress.step == 3


def test_generate_returns_the_pictures() -> None:
    with (
        StubGateway(accepted(), view("succeeded", 4, pictures=2), Reply(body=PIXELS)) as stub,
        Client(stub.url) as client,
    ):
        made = client.generate("a cat", n=2)
    assert list(made.images) == [PIXELS, PIXELS]
    assert [asked.path for asked in stub.asked[2:]] == [f"/view/{TASK}/0.webp", f"/view/{TASK}/1.webp"]


def test_a_picture_that_arrives_damaged_is_refused() -> None:
    with (
        StubGateway(accepted(), view("succeeded"), Reply(body=PIXELS[:-1])) as stub,
        Client(stub.url) as client,
        pytest.raises(ClientError, match="damaged"),
    ):
        client.generate("a cat")


@pytest.mark.parametrize(
    ("status", "says"),
    [("failed", "failed: out of paint .pipeline_failed"), ("canceled", "was canceled"), ("expired", "deadline")],
)
def test_generate_says_why_there_is_no_picture(status: str, says: str) -> None:
    error = {"code": "pipeline_failed", "message": "out of paint", "retryable": False} if status == "failed" else None
    with (
        StubGateway(accepted(), view(status, error=error)) as stub,
        Client(stub.url) as client,
        pytest.raises(TaskFailed, match=says) as caught,
    ):
        client.generate("a cat")
    assert caught.value.view.status == status


def test_queue_workers_and_models_are_read() -> None:
    queue = {
        "name": "turbo.high.default", "model": "turbo", "priority": "high", "tenant": "default", "queued": 3,
        "running": 1, "oldest_age_seconds": 1.5, "new": True,
    }  # fmt: skip
    with StubGateway(Reply(body={"queues": [queue]})) as stub, Client(stub.url) as client:
        assert client.queue()[0].queued == 3
    with StubGateway(Reply(body={"workers": []})) as stub, Client(stub.url) as client:
        assert client.workers() == []
    with StubGateway(Reply(body={"models": []})) as stub, Client(stub.url) as client:
        assert client.models() == []


def test_bad_health_is_an_answer_and_no_error() -> None:
    body = {
        "status": "unhealthy", "reasons": ["Redis is away"], "uptime_seconds": 1.0, "gpu_memory_used_mb": 0,
        "pending_tasks": 0, "models_loaded": [], "workers": 0,
    }  # fmt: skip
    with StubGateway(Reply(status=503, body=body)) as stub, Client(stub.url) as client:
        assert client.health().status == "unhealthy"


def test_ready_says_why_not() -> None:
    with StubGateway(problem(503, "no_worker", "no worker is alive")) as stub, Client(stub.url) as client:
        assert client.ready() == "no worker is alive"
    assert len(stub.asked) == 1
    with StubGateway(Reply(body={"status": "ready"})) as stub, Client(stub.url) as client:
        assert client.ready() is None


def test_the_environments_proxy_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with StubGateway(view("running")) as stub, Client(stub.url) as client:
        assert client.status(TASK).status == "running"


KEY = f"zfk_{'0' * 12}_{'f' * 64}"


def test_the_key_is_shown_to_the_gateway_and_to_nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with StubGateway(Reply(body=PIXELS)) as elsewhere:
        away = Reply(status=302, body=b"", headers={"Location": f"{elsewhere.url}/bucket"})
        with StubGateway(view("queued"), away) as stub, Client(stub.url, api_key=f" {KEY}\n") as client:
            client.status(TASK)
            assert client.fetch("/view/x/0.webp") == PIXELS
            assert client.fetch(f"{elsewhere.url}/direct") == PIXELS
        assert [asked.headers.get("Authorization") for asked in stub.asked] == [f"Bearer {KEY}"] * 2
        assert KEY not in str([asked.headers for asked in elsewhere.asked])
    with StubGateway(view("queued")) as stub, Client(stub.url) as client:
        client.status(TASK)
    assert "Authorization" not in stub.asked[0].headers


def test_an_answer_that_wants_a_key_names_the_setting() -> None:
    with StubGateway(problem(401, "unauthenticated", "this call needs an API key")) as stub, Client(stub.url) as client:
        with pytest.raises(Refused, match=r"needs an API key; set ZFLEET_API_KEY"):
            client.status(TASK)
        assert len(stub.asked) == 1, "asking again does not help"


@pytest.mark.parametrize("key", ["zfk_ä", "zfk\r\nX-Evil: 1", "\x00"])
def test_what_can_be_no_key_is_told_before_it_is_sent(key: str) -> None:
    with pytest.raises(ConfigurationError, match="ZFLEET_API_KEY") as caught:
        Client("http://127.0.0.1:1", api_key=key)
    assert key not in caught.value.message
