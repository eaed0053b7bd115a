"""Who is let in: keys, scopes, the open tenant, and how often a key may submit."""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from bench.counting import monitored
from common import apikeys, registry
from common.broker import Broker
from common.problem import Problem
from common.settings import Settings
from gateway import admission, dialects
from gateway.app import close, create_app
from tests.servers import RedisServer
from tests.tenants import bearer, new_key, revoke
from tests.unit.gateway.fake_worker import FakeWorker

PROMPT = {"prompt": "a red circle"}
ELSEWHERE = {"REMOTE_ADDR": "192.0.2.7"}
LIMITS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")


@pytest.fixture
def app(settings: Settings, broker: Broker) -> Iterator[OpenAPI]:
    """A gateway that speaks every dialect."""
    app = create_app(settings.model_copy(update={"dialects": registry.discover(dialects)}), broker)
    yield app
    close(app)


def submit(client: FlaskClient, key: str, **fields: object) -> TestResponse:
    return client.post("/api/submit", json=PROMPT | fields, headers=bearer(key))


def sealed(answer: TestResponse) -> tuple[object, ...]:
    """All of an answer but its request id."""
    headers = [(name, value) for name, value in answer.headers if name != "X-Request-ID"]
    return answer.status, headers, answer.data


def forget(app: OpenAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the two seconds pass for which a gateway takes what it knows of keys."""

    class Later:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + admission.KNOWN_S

    monkeypatch.setattr(admission, "time", Later)


# Keys


def test_a_key_opens_its_tenants_door_in_either_header(client: FlaskClient, broker: Broker) -> None:
    key = new_key(broker)
    both = {"X-API-Key": key, **bearer(key)}
    for headers in (bearer(key), {"Authorization": f"bEARER  {key} "}, {"X-API-Key": key}, both):
        answer = client.post("/api/submit", json=PROMPT, headers=headers)
        assert answer.status_code == 202
        record = broker.view(answer.get_json()["task_id"])
        assert record is not None
        assert record.tenant == "acme"


def refused(broker: Broker) -> Iterator[dict[str, str]]:
    """Headers of every kind that open nothing."""
    good, other, gone = new_key(broker), new_key(broker, "other", admin=True), new_key(broker)
    late, rotated = new_key(broker, lasts_s=-1), new_key(broker)
    for key in (gone, rotated):
        revoke(broker, key)
    _, key_id, secret = good.split("_")
    _, other_id, other_secret = other.split("_")
    yield {}
    for text in (
        gone, late, rotated, f"zfk_{key_id}_{other_secret}", f"zfk_{other_id}_{secret}", f"zfk_{'0' * 12}_{secret}",
        good[:-1], good + "0", good.upper(), key_id, secret, "", "zfk_", "x" * 5000, "\u00e4\u00ff", f"{good},{good}",
    ):  # fmt: skip
        yield bearer(text)
        yield {"X-API-Key": text}
    yield {"Authorization": good}
    yield {"Authorization": f"Basic {good}"}
    yield {"X-API-Key": other, **bearer(good)}
    yield {"X-API-Key": "", **bearer(good)}


def test_whatever_opens_nothing_is_answered_alike(client: FlaskClient, broker: Broker) -> None:
    shown = list(refused(broker))
    for method, path in (
        ("GET", "/api/queue"), ("POST", "/api/submit"), ("GET", "/api/workers"), ("POST", "/v1/images/generations"),
        ("GET", f"/api/status/{'0' * 32}"), ("GET", f"/view/{'0' * 32}/0.webp"),
    ):  # fmt: skip
        answers = [client.open(path, method=method, headers=headers) for headers in shown]
        assert len({repr(sealed(answer)) for answer in answers}) == 1
        assert answers[0].status_code == 401
        assert answers[0].headers["WWW-Authenticate"] == 'Bearer realm="zfleet"'
        if not path.startswith("/v1/"):
            assert Problem.model_validate_json(answers[0].data).code == "unauthenticated"


def test_secrets_are_compared_in_constant_time_of_unknown_ids_too(
    client: FlaskClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []

    def watched(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    class Watched:
        compare_digest = staticmethod(watched)

    good = new_key(broker)
    late = new_key(broker, lasts_s=-1)
    monkeypatch.setattr(apikeys, "hmac", Watched)
    for key in (good, late, f"zfk_{good.split('_')[1]}_{'0' * 64}", f"zfk_{'0' * 12}_{'0' * 64}"):
        client.get("/api/queue", headers=bearer(key))
    assert len(compared) == 4
    assert all(len(one) == len(other) == 64 for one, other in compared)


def test_redis_holds_the_hash_alone(client: FlaskClient, broker: Broker, redis_server: RedisServer) -> None:
    key = new_key(broker, rate="10/s")
    secret = key.split("_")[2]
    assert submit(client, key).status_code == 202
    dumped = {name: dump(redis_server, name) for name in redis_server.client.scan_iter()}
    assert any(apikeys.Token.parse(key).digest in text for text in dumped.values())  # type: ignore[union-attr]
    assert not [name for name, text in dumped.items() if secret in name + text]


def dump(server: RedisServer, name: str) -> str:
    """What a key of Redis holds, as text."""
    client, kind = server.client, server.client.type(name)
    read = {"hash": client.hgetall, "set": client.smembers, "string": client.get}
    whole = {"list": lambda n: client.lrange(n, 0, -1), "zset": lambda n: client.zrange(n, 0, -1, withscores=True)}
    return str((read | whole)[str(kind)](name))


def test_a_revoked_key_is_refused_within_two_seconds(client: FlaskClient, broker: Broker) -> None:
    key = new_key(broker)
    assert client.get("/api/queue", headers=bearer(key)).status_code == 200
    revoke(broker, key)
    until = time.monotonic() + 2.0
    asked_at = time.monotonic()
    while client.get("/api/queue", headers=bearer(key)).status_code == 200:
        assert asked_at < until
        time.sleep(0.05)
        asked_at = time.monotonic()


def test_an_expired_key_is_refused_at_once(client: FlaskClient, broker: Broker) -> None:
    key = new_key(broker, lasts_s=1.0)
    assert client.get("/api/queue", headers=bearer(key)).status_code == 200
    time.sleep(1.0)
    assert client.get("/api/queue", headers=bearer(key)).status_code == 401


def test_every_route_wants_a_key_but_the_public_ones(app: OpenAPI, broker: Broker, client: FlaskClient) -> None:
    new_key(broker)
    public = set()
    for rule in app.url_map.iter_rules():
        name = "app.css" if str(rule).startswith("/web/") else "swagger-ui.css"
        path = str(rule).replace("<path:name>", name).replace("<", "").replace(">", "")
        for method in (rule.methods or set()) - {"OPTIONS"}:
            if client.open(path, method=method).status_code != 401:
                public.add(str(rule))
    assert public == {
        "/health",
        "/ready",
        "/live",
        "/openapi.json",
        "/docs",
        "/docs/start.js",
        "/docs/assets/<path:name>",
        "/",
        "/web/<path:name>",
    }


# Scopes


def test_the_fleet_is_for_admins_and_a_tenant_sees_its_own_queues(client: FlaskClient, broker: Broker) -> None:
    acme, admin = new_key(broker), new_key(broker, "operators", admin=True)
    for key in (acme, new_key(broker, "other"), admin):
        assert submit(client, key).status_code == 202
    assert client.get("/api/workers", headers=bearer(admin)).status_code == 200
    answer = client.get("/api/workers", headers=bearer(acme))
    assert (answer.status_code, answer.get_json()["code"]) == (403, "forbidden")
    seen = {
        key: {queue["tenant"] for queue in client.get("/api/queue", headers=bearer(key)).get_json()["queues"]}
        for key in (acme, admin)
    }
    assert seen == {acme: {"acme"}, admin: {"acme", "other", "operators"}}


def test_an_admin_lists_anybodys_tasks(client: FlaskClient, broker: Broker) -> None:
    acme, other, admin = new_key(broker), new_key(broker, "other"), new_key(broker, "operators", admin=True)
    ids = {key: [submit(client, key).get_json()["task_id"] for _ in range(3)] for key in (acme, other)}

    def listed(key: str, **query: str) -> list[str]:
        answer = client.get("/api/tasks", query_string=query, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        return [task["task_id"] for task in answer.get_json()["tasks"]]

    assert set(listed(acme)) == set(listed(acme, tenant="acme")) == set(listed(admin, tenant="acme")) == set(ids[acme])
    assert listed(admin) == listed(admin, tenant="nobody") == []
    everybody = client.get("/api/tasks?tenant=*&limit=4", headers=bearer(admin)).get_json()
    rest = client.get(f"/api/tasks?tenant=*&cursor={everybody['next_cursor']}", headers=bearer(admin)).get_json()
    tasks = everybody["tasks"] + rest["tasks"]
    assert sorted(task["task_id"] for task in tasks) == sorted(ids[acme] + ids[other])
    assert Counter(task["tenant"] for task in tasks) == {"acme": 3, "other": 3}
    for whose in ("other", "nobody", "*"):
        answer = client.get("/api/tasks", query_string={"tenant": whose}, headers=bearer(acme))
        assert (answer.status_code, answer.get_json()["code"]) == (403, "forbidden")
    answer = client.get("/api/tasks?tenant=A.B", headers=bearer(admin))
    assert (answer.status_code, answer.get_json()["errors"][0]["loc"]) == (422, "tenant")


def test_an_admin_sees_and_cancels_any_task(client: FlaskClient, broker: Broker) -> None:
    task_id = submit(client, new_key(broker)).get_json()["task_id"]
    admin = bearer(new_key(broker, "operators", admin=True))
    assert client.get(f"/api/status/{task_id}", headers=admin).get_json()["status"] == "queued"
    assert client.post(f"/api/cancel/{task_id}", headers=admin).get_json()["status"] == "canceled"


@pytest.mark.parametrize(
    ("highest", "asked", "given"),
    [
        ("high", None, "normal"), ("high", "high", "high"), ("normal", None, "normal"), ("normal", "low", "low"),
        ("normal", "high", "must be normal or low"), ("low", None, "low"), ("low", "low", "low"),
        ("low", "normal", "must be low"),
    ],
)  # fmt: skip
def test_a_priority_above_a_keys_is_refused(
    client: FlaskClient, broker: Broker, highest: str, asked: str | None, given: str
) -> None:
    answer = submit(client, new_key(broker, priority_max=highest), **({"priority": asked} if asked else {}))
    if " " not in given:
        record = broker.view(answer.get_json()["task_id"])
        assert record is not None
        assert record.request.priority == given
    else:
        (error,) = Problem.model_validate_json(answer.data).errors
        assert (answer.status_code, error.loc, error.msg) == (422, "priority", f"{given} with this API key")


# The open tenant


def served(client: FlaskClient, **request: object) -> bool:
    answer = client.get("/api/workers", **request)  # type: ignore[arg-type]
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


def test_without_keys_this_machine_is_one_open_tenant_with_all_rights(client: FlaskClient, broker: Broker) -> None:
    assert served(client)
    assert served(client, headers=bearer("sk-whatever")), "as clients send that cannot do without"
    assert served(client, headers={"X-Forwarded-For": "127.0.0.1, ::1"}, environ_base={"REMOTE_ADDR": "::1"})
    answer = client.post("/api/submit", json=PROMPT)
    record = broker.view(answer.get_json()["task_id"])
    assert record is not None
    assert record.tenant == "default"


def test_but_nobody_else(client: FlaskClient, settings: Settings, broker: Broker) -> None:
    for passed_on in ("192.0.2.7", "127.0.0.1, 192.0.2.7", "x", ", "):
        assert not served(client, headers={"X-Forwarded-For": passed_on})
    for other in ({"X-Real-IP": "203.0.113.9"}, {"Forwarded": "for=203.0.113.9"}):
        assert not served(client, headers=other)
    assert not served(client, environ_base=ELSEWHERE)
    assert not served(client, environ_base=ELSEWHERE, headers={"X-Forwarded-For": "127.0.0.1"})
    insecure = create_app(settings.model_copy(update={"insecure": True}), broker).test_client()
    assert served(insecure, environ_base=ELSEWHERE)


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"])
def test_a_gateway_that_listens_beyond_this_machine_never_has_one(
    settings: Settings, broker: Broker, host: str, insecure: bool
) -> None:
    client = create_app(settings.model_copy(update={"host": host, "insecure": insecure}), broker).test_client()
    assert served(client) is insecure
    assert served(client, environ_base=ELSEWHERE) is insecure


def test_from_the_first_key_on_it_is_gone(
    app: OpenAPI, client: FlaskClient, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served(client)
    key = new_key(broker, admin=True)
    forget(app, monkeypatch)
    assert not served(client)
    assert served(client, headers=bearer(key))
    revoke(broker, key)
    assert broker.guarded(), "without a key that works nobody is served"


# How often


def test_a_burst_passes_exactly_however_many_come_at_once(app: OpenAPI, broker: Broker) -> None:
    key = new_key(broker, rate="10/m")
    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(lambda _: submit(app.test_client(), key), range(100)))
    assert Counter(answer.status_code for answer in answers) == {202: 10, 429: 90}
    assert broker.pending() == 10
    passed = [answer for answer in answers if answer.status_code == 202]
    assert sorted(int(answer.headers["X-RateLimit-Remaining"]) for answer in passed) == list(range(10))


def test_every_answer_to_a_limited_submit_says_how_the_rate_stands(client: FlaskClient, broker: Broker) -> None:
    key = new_key(broker, rate="4/h")
    bodies = [{"json": PROMPT}, {"json": {"prompt": ""}}, {"data": "{"}, {"data": "x", "content_type": "text/plain"}]
    answers = [client.post("/api/submit", headers=bearer(key), **body) for body in (*bodies, bodies[0])]  # type: ignore[arg-type]
    assert [answer.status_code for answer in answers] == [202, 422, 400, 415, 429]
    assert [answer.headers["X-RateLimit-Limit"] for answer in answers] == ["4"] * 5
    assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["3", "2", "1", "0", "0"]
    resets = [int(answer.headers["X-RateLimit-Reset"]) for answer in answers]
    assert resets == pytest.approx([900, 1800, 2700, 3600, 3600], abs=5)
    problem = Problem.model_validate_json(answers[-1].data)
    assert problem.code == "rate_limited"
    assert int(answers[-1].headers["Retry-After"]) == pytest.approx(900, abs=5)
    assert "Retry-After" not in answers[0].headers
    other = client.get("/api/queue", headers=bearer(key))
    assert not {*LIMITS} & {*other.headers.keys()}, "only submits count"


def test_a_rate_is_each_keys_own_and_refills(client: FlaskClient, broker: Broker) -> None:
    quick, slow, free = new_key(broker, rate="5/s"), new_key(broker, rate="1/d"), new_key(broker)
    assert submit(client, slow).status_code == 202
    assert submit(client, slow).status_code == 429
    assert not {*LIMITS} & {*submit(client, free).headers.keys()}
    for _ in range(5):
        submit(client, quick)
    last = submit(client, quick)
    if last.status_code == 429:  # a slow machine has let a fifth of a second pass
        time.sleep(int(last.headers["Retry-After"]))
    assert submit(client, quick).status_code == 202


def test_pictures_sent_ahead_count_like_submits(client: FlaskClient, broker: Broker) -> None:
    key = new_key(broker, rate="2/h")
    answers = [client.post("/api/images", headers=bearer(key), json={"image": "x"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [422, 422, 429]
    assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["1", "0", "0"]
    assert submit(client, key).status_code == 429


def test_a_limited_submit_is_refused_before_its_body_is_read(client: FlaskClient, broker: Broker) -> None:
    class Body:
        def read(self, *_: object) -> bytes:
            raise AssertionError("the body was read")

    key = new_key(broker, rate="1/h")
    submit(client, key)
    environ = {"wsgi.input": Body(), "CONTENT_LENGTH": "1000000", "CONTENT_TYPE": "multipart/form-data; boundary=x"}
    answer = client.post("/api/submit", headers=bearer(key), environ_overrides=environ)
    assert answer.status_code == 429


NOT_SUBMITS = {
    "/api/cancel/<task_id>",
    "/api/images",
    "/api/webhooks/secret/rotate",
    "/api/fleet/pause",
    "/api/fleet/resume",
    "/api/workers/<name>/drain",
    "/api/workers/<name>/resume",
    "/api/workers/<name>/restart",
    "/api/failed/requeue",
    "/api/failed/purge",
    "/api/keys",
    "/api/keys/<key_id>/revoke",
    "/api/keys/<key_id>/rotate",
}


def test_every_route_that_makes_tasks_counts(app: OpenAPI) -> None:
    for rule in app.url_map.iter_rules():
        if "POST" in (rule.methods or ()) and str(rule) not in NOT_SUBMITS:
            assert hasattr(app.view_functions[rule.endpoint], "submits"), f"mark {rule} with admission.submits"


def test_keys_and_rates_cost_a_submit_two_round_trips_at_most(
    app: OpenAPI, broker: Broker, worker: FakeWorker, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = app.test_client()
    limited, free = new_key(broker, rate="1000/s"), new_key(broker)
    submit(client, limited)  # scripts are loaded, connections made
    forget(app, monkeypatch)

    def commands(key: str) -> list[str]:
        with monitored(redis_server.client) as heard:
            assert submit(client, key).status_code == 202
        return [name for source, command in heard if source != "lua" and (name := command.split(" ")[0]) != "HELLO"]

    assert commands(limited)[:2] == ["HGET", "EVALSHA"]
    once = commands(limited)
    assert once[0] == "EVALSHA", "the key is known"
    assert len(once) == 2, "the rate's and the task's"
    commands(free)
    assert len(commands(free)) == 1, "as without keys"
    with monitored(redis_server.client) as heard:
        worker.take(room=2)
    assert not [command for source, command in heard if source == "lua" and "zf:rates" in command]
