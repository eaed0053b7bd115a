"""Users of the public HTTP API: submit, wait, fetch the picture, check it. The time to the picture is an event too.

Closed loop unless told otherwise: a user asks for its next picture when it has the last one. With
`--arrivals-per-s R` the users together start R pictures a second on average (a Poisson process), however long each
takes. Run by loadtest/run.py, or by hand against a gateway on this machine:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
import gevent.pool  # type: ignore[import-untyped]
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import StatsEntry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # locust loads this file by its path

from common.settings import load_settings
from loadtest.menu import Limits, order
from loadtest.target import NotLoopback, require_loopback

WAIT_S = 25  # one long poll; below the 60 s that the gateway allows, so that no proxy cuts it off
RETRY_AFTER_MAX_S = 60.0
AFTER_FAILURE_S = 1.0  # a user whose picture failed does not try again at once
IN_FLIGHT_MAX = 1000  # pictures one user may have under way with open arrivals; those beyond are failures
IMAGE = ("time to image", "IMAGE")  # name and type of the event, as locust keys its figures
MEDIA_TYPES = {"webp": "image/webp", "png": "image/png", "jpeg": "image/jpeg"}


class NoPicture(Exception):
    """Raised when a picture could not be had; the text says why."""


class ComeBackLater(Exception):
    """Raised when the gateway said 429 or 503 and when to try again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"in {seconds:g} s")
        self.seconds = min(max(seconds, 0.1), RETRY_AFTER_MAX_S)


def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("zfleet")
    group.add_argument("--model", default="", env_var="LOADTEST_MODEL", help="alias to ask for; the gateway's default")
    group.add_argument("--arrivals-per-s", type=float, default=0.0, help="open arrivals instead of a closed loop")
    group.add_argument("--patience-s", type=float, default=300.0, help="a picture that takes longer is a failure")
    group.add_argument("--warm-up-s", type=float, default=0.0, help="seconds before figures start afresh")
    group.add_argument("--figures", default="", help="write the figures between warm-up and stop here, as JSON")


class Figures:
    """Figures from the first picture after the warm-up to the beginning of the stop, as locust counts them."""

    def __init__(self, environment: Environment, options: Namespace) -> None:
        self._environment = environment
        self._options = options
        self._warm_at = float("inf")  # time.monotonic()
        self._warm = options.warm_up_s <= 0
        self._failed = 0  # since the very start: a failure in the warm-up is one, too
        self._first_failure = ""
        self._measured: dict[str, Any] = {}
        hooks: Any = environment.events
        hooks.spawning_complete.add_listener(self._spawned)
        hooks.request.add_listener(self._heard)
        hooks.test_stopping.add_listener(self._stopping)
        hooks.quitting.add_listener(self._write)

    def _spawned(self, **_: Any) -> None:
        self._warm_at = time.monotonic() + self._options.warm_up_s

    def _heard(self, request_type: str, name: str, exception: object = None, **_: Any) -> None:
        if exception:
            self._failed += 1
            self._first_failure = self._first_failure or f"{request_type} {name}: {exception}"
        elif not self._warm and (name, request_type) == IMAGE and time.monotonic() >= self._warm_at:
            self._warm = True
            self._environment.stats.reset_all()  # locust has counted this picture: the clock starts at its arrival

    def _stopping(self, **_: Any) -> None:
        """Note the figures before users finish what they have in hand, when fewer and fewer ask for more."""
        entry = self._environment.stats.entries.get(IMAGE)
        if self._warm and entry and entry.num_requests > entry.num_failures:
            self._measured = _measured(entry)
        later = [each for (name, _), each in self._environment.stats.entries.items() if name.startswith("later:")]
        self._measured["later"] = sum(each.num_requests for each in later)

    def _write(self, **_: Any) -> None:
        if self._options.figures:
            figures = {"failures": self._failed, "first_failure": self._first_failure, **self._measured}
            Path(self._options.figures).write_text(json.dumps(figures, indent=1), "utf-8")
        if self._failed:
            self._environment.process_exit_code = 1


def _measured(entry: StatsEntry) -> dict[str, Any]:
    images = entry.num_requests - entry.num_failures
    assert entry.last_request_timestamp is not None
    seconds = entry.last_request_timestamp - entry.start_time  # from one picture's arrival to another's
    percentiles = {f"p{p}_ms": entry.get_response_time_percentile(p / 100) for p in (50, 95, 99)}
    return {"images": images, "seconds": seconds, "images_per_s": images / seconds if seconds else 0.0, **percentiles}


def _prepare(environment: Environment, **_: Any) -> None:
    if environment.host:
        try:
            require_loopback(environment.host)
        except NotLoopback as error:
            sys.stderr.write(f"locustfile: {error}\n")
            sys.exit(2)
    assert environment.parsed_options is not None
    Figures(environment, environment.parsed_options)


_hooks: Any = events  # locust gives these no types
_hooks.init_command_line_parser.add_listener(_add_options)
_hooks.init.add_listener(_prepare)


class Painter(FastHttpUser):
    """Wants one picture after the other; finishes the one in hand when the test stops."""

    max_redirects = 0  # a redirect could lead off this machine
    max_retries = 0
    concurrency = IN_FLIGHT_MAX
    connection_timeout = 10.0
    network_timeout = WAIT_S + 20.0

    def __init__(self, environment: Environment) -> None:
        if key := load_settings().api_key:
            self.default_headers = {"Authorization": f"Bearer {key.get_secret_value()}"}
        super().__init__(environment)
        require_loopback(self.host or "")  # once more: the web page lets anybody type another
        assert environment.parsed_options is not None
        self._options = environment.parsed_options
        self._rng = random.Random()
        self._in_flight = gevent.pool.Pool(IN_FLIGHT_MAX)
        self._limits: Limits

    def on_start(self) -> None:
        """Learn what may be asked for."""
        began = time.perf_counter()
        try:
            until = time.monotonic() + self._options.patience_s
            answer = self._patiently(until, "GET", "/api/models", "/api/models", 200)
            self._limits = Limits.read(answer["models"], self._options.model)
        except (NoPicture, LookupError) as error:
            self._report(time.time(), began, 0, error)
            raise StopUser from None

    def on_stop(self) -> None:
        """Finish what is under way."""
        self._in_flight.join()

    def wait_time(self) -> float:
        """Return the seconds to the next arrival; none in a closed loop."""
        rate = float(self._options.arrivals_per_s)
        if not rate:
            return 0.0
        users = max(1, self.environment.runner.target_user_count if self.environment.runner else 1)
        return self._rng.expovariate(rate / users)

    @task
    def picture(self) -> None:
        """Ask for a picture and, in a closed loop, stay until it is there."""
        if not self._options.arrivals_per_s:
            self._one()
        elif self._in_flight.full():
            self._report(time.time(), time.perf_counter(), 0, NoPicture(f"{IN_FLIGHT_MAX} are under way already"))
        else:
            self._in_flight.spawn(self._one)

    def _one(self) -> None:
        wall, began = time.time(), time.perf_counter()
        until = time.monotonic() + self._options.patience_s
        try:
            size = self._fetch(self._await(self._submit(until), until))
        except NoPicture as why:
            self._report(wall, began, 0, why)
            gevent.sleep(AFTER_FAILURE_S)
        else:
            self._report(wall, began, size, None)

    def _report(self, wall: float, began: float, size: int, exception: Exception | None) -> None:
        name, kind = IMAGE
        self.environment.events.request.fire(
            request_type=kind, name=name, start_time=wall, response_time=(time.perf_counter() - began) * 1000,
            response_length=size, exception=exception, context={}, response=None, url="",
        )  # fmt: skip

    def _submit(self, until: float) -> str:
        """Return the url of the task's status; comes back as told while the fleet is full or away."""
        body = order(self._rng, self._limits)
        key = f"{self._rng.getrandbits(128):032x}"  # a submit sent twice makes one task
        answer = self._patiently(
            until, "POST", "/api/submit", "/api/submit", 202, json=body, headers={"Idempotency-Key": key}
        )
        return str(answer["status_url"])

    def _await(self, url: str, until: float) -> dict[str, Any]:
        """Return the one picture's entry in the task's final status."""
        while time.monotonic() < until:
            status = self._patiently(until, "GET", f"{url}?wait={WAIT_S}", "/api/status/[id]?wait", 200)
            if status["status"] == "succeeded":
                if len(status["images"]) != 1:
                    raise NoPicture(f"asked for one picture, got {len(status['images'])}")
                return dict(status["images"][0])
            if status["status"] not in ("queued", "running"):
                raise NoPicture(f"the task ended as {status['status']} ({(status['error'] or {}).get('code')})")
        raise NoPicture(f"not there within {self._options.patience_s:g} s")

    def _fetch(self, image: dict[str, Any]) -> int:
        """Fetch the picture and check it against its entry; returns its size in bytes."""
        url = str(image["url"])
        if not url.startswith("/"):
            require_loopback(url)
        with self.client.get(url, name="/view/[id]/[k]", catch_response=True) as answer:
            data = answer.content or b""
            wrong = _wrong(image, data, answer.headers)
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                raise NoPicture(f"the picture answers with {answer.status_code}")
            if wrong:
                answer.failure(wrong)
                raise NoPicture(wrong)
            return len(data)

    def _patiently(self, until: float, *call: Any, **options: Any) -> dict[str, Any]:
        """`_call`, again and again until it is not told to come back later; raises NoPicture."""
        while True:
            try:
                return self._call(*call, **options)
            except ComeBackLater as later:
                if time.monotonic() + later.seconds > until:
                    raise NoPicture(f"told to come back later until {self._options.patience_s:g} s were over") from None
                gevent.sleep(later.seconds * self._rng.uniform(1.0, 1.25))  # so that not all come back at once

    def _call(self, method: str, url: str, name: str, expected: int, **options: Any) -> dict[str, Any]:
        """Return the answer's JSON; raises ComeBackLater, counted under a name of its own, and NoPicture, a failure."""
        with self.client.request(method, url, name=name, catch_response=True, **options) as answer:
            if answer.status_code in (429, 503) and (answer.headers or {}).get("Retry-After", "").isdecimal():
                answer.request_meta["name"] = f"later: {answer.status_code} {name}"
                answer.success()
                raise ComeBackLater(float(answer.headers["Retry-After"]))
            if answer.status_code != expected:
                cause = answer.error or f"status {answer.status_code}: {(answer.text or '')[:200]}"
                answer.failure(str(cause))
                raise NoPicture(f"{name}: {cause}")
            try:
                return dict(answer.json())
            except ValueError:
                answer.failure("no JSON")
                raise NoPicture(f"{name}: no JSON") from None


def _wrong(image: dict[str, Any], data: bytes, headers: Any) -> str:
    """Return what is wrong with a picture that was fetched, or nothing."""
    media_type = ((headers or {}).get("Content-Type") or "").partition(";")[0]
    if media_type != MEDIA_TYPES.get(image["format"]):
        return f"Content-Type {media_type!r} for format {image['format']}"
    if len(data) != image["bytes"]:
        return "not as many bytes as its status says"
    if hashlib.sha256(data).hexdigest() != image["sha256"]:
        return "not the SHA-256 of its status"
    return ""
