"""The Python client: submit a prompt, wait for it, fetch the pictures. Speaks nothing but the public HTTP API."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import requests
from pydantic import BaseModel, TypeAdapter, ValidationError
from requests import PreparedRequest
from requests.auth import AuthBase

from common.cards import Health, ModelView, QueueDepth, WorkerCard
from common.errors import ClientError, ConfigurationError, FieldError, Unauthenticated
from common.fleet import Fleet
from common.history import History
from common.inputs import FIELDS
from common.problem import Problem
from common.schemas import InputImage, SubmitAnswer, TaskPage, TaskStatus, TaskView
from common.templates import TemplateView
from zfleet import pictures

M = TypeVar("M", bound=BaseModel)

KEY_WANTED = "set ZFLEET_API_KEY, or api_key of Client, to a key that `zfleet keys create` made"

DEFAULT_TIMEOUT_S = 30.0  # one call, retries included
FIRST_CONTACT_S = 1.0  # a port where nothing ever answered is a wrong URL sooner than a restart
CONNECT_TIMEOUT_S = 5.0
LONG_POLL_S = 30.0  # below the 60 s that the gateway allows, so that no proxy cuts it off
FIRST_PAUSE_S = 0.2  # between polls or tries; grows by half until LONGEST_PAUSE_S, and starts afresh at any change
LONGEST_PAUSE_S = 2.0

# The gateway, or a proxy before it, did nothing and may do it later.
_LATER = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


class Unreachable(ClientError):
    """Raised when no gateway answers at the URL."""

    code = "gateway_unreachable"
    retryable = True


class Refused(ClientError):
    """Raised when the gateway refuses a call. `code` and `errors` are the problem's own, `problem` is all of it."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        wanted = f"{problem.detail}; {KEY_WANTED}" if problem.code == Unauthenticated.code else problem.detail
        super().__init__(wanted, errors=[FieldError(error.loc, error.msg) for error in problem.errors])
        self.problem = problem
        self.retry_after_s = retry_after_s
        self.__dict__["code"] = problem.code  # the class's code says less than the one that came over the wire

    @property
    def later(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.problem.status in _LATER


class NotInTime(ClientError):
    """Raised when a task is not final within the time that the caller gave; it goes on. `view` is its last status."""

    code = "not_in_time"
    retryable = True

    def __init__(self, message: str, view: TaskView) -> None:
        super().__init__(message)
        self.view = view


class TaskFailed(ClientError):
    """Raised by `generate` when the task ended without a picture: failed, canceled or expired. `view` says why."""

    code = "task_failed"

    def __init__(self, view: TaskView) -> None:
        why = {
            TaskStatus.CANCELED: "was canceled",
            TaskStatus.EXPIRED: "expired: its deadline passed before it began",
        }.get(view.status, f"failed: {view.error.message} ({view.error.code})" if view.error else "failed")
        super().__init__(f"task {view.task_id} {why}")
        self.view = view


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """A finished task and its pictures as encoded files, in the order of `view.images`."""

    view: TaskView
    images: Sequence[bytes]


class Client:
    """Calls one gateway. For use by one thread.

    A call tries for up to `timeout_s` seconds (plus the seconds it asks the gateway to wait): it repeats itself when
    the connection breaks and sending twice is harmless, and when the gateway says "later", honouring Retry-After.
    All methods raise Unreachable or Refused, both of which are ClientErrors.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """`url` is the gateway's root, as http://127.0.0.1:8080; raises ConfigurationError when it is no HTTP URL.

        The API key, if the gateway wants one, is shown to nobody else, wherever a picture's URL or a redirect leads.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"{url!r} is not a gateway's URL; it looks like http://127.0.0.1:8080")
        self.url = url.rstrip("/") + "/"
        self._timeout_s = timeout_s
        self._session = requests.Session()
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            self._session.trust_env = False  # the environment's proxy cannot reach this machine's loopback
        self._session.auth = _Key(self.url, api_key.strip()) if api_key else None
        self._reached = False

    def submit(self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Any) -> SubmitAnswer:
        """Hand in a task and return at once. `fields` are GenerateRequest's; None leaves one to the model's default.

        With a `template` the prompt stands for its placeholder {prompt}, and `values` for the others.

        A picture to start from is a handle of `upload`, base64, or the Path of a file; raises CannotRead for the last.
        A key is made where none is given, so that a submit whose answer got lost is sent again without a second task.
        """
        asked = {"prompt": prompt, **fields}
        body = {name: value for name, value in asked.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        files = _take_files(body)
        if not files:
            return self._call(SubmitAnswer, "POST", "api/submit", json=body, headers=headers)
        parts = [("request", (None, json.dumps(body).encode(), "application/json")), *files]
        return self._call(SubmitAnswer, "POST", "api/submit", files=parts, headers=headers)

    def upload(self, path: Path) -> InputImage:
        """Send a picture to start from, of which several tasks can be made by its handle; raises CannotRead."""
        return self._call(InputImage, "POST", "api/images", files=[("image", (path.name, pictures.read(path)))])

    def status(self, task_id: str, wait: float = 0.0) -> TaskView:
        """Return a task's status: now, or within `wait` (up to 60) seconds as soon as it is final."""
        params = {"wait": f"{wait:g}"} if wait > 0 else {}
        return self._call(TaskView, "GET", f"api/status/{_part(task_id)}", params=params, extra_s=wait)

    def wait(
        self, task_id: str, timeout_s: float | None = None, on_progress: Callable[[TaskView], None] | None = None
    ) -> TaskView:
        """Return the status once it is final; raises NotInTime after `timeout_s` (None: never).

        `on_progress` is called with every status seen, a few times a second while steps go by.
        """
        until = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        seen: tuple[object, ...] = ()
        pause = FIRST_PAUSE_S
        while True:
            left = until - time.monotonic()
            view = self.status(task_id, wait=max(0.0, min(left, pause if on_progress else LONG_POLL_S)))
            if on_progress:
                on_progress(view)
            if view.status.final:
                return view
            if time.monotonic() >= until:
                raise NotInTime(f"task {task_id} is still {view.status} after {timeout_s:g} s", view)
            now = (view.status, view.progress.step, view.position)
            pause = FIRST_PAUSE_S if now != seen else min(LONGEST_PAUSE_S, pause * 1.5)
            seen = now

    def cancel(self, task_id: str) -> TaskView:
        """Cancel a task and return its status; Refused with code `already_final` when it had ended before."""
        return self._call(TaskView, "POST", f"api/cancel/{_part(task_id)}", repeatable=False)

    def tasks(
        self, *, status: TaskStatus | None = None, limit: int | None = None, cursor: str | None = None
    ) -> TaskPage:
        """Return a page of this caller's tasks, newest first."""
        asked = {"status": status, "limit": limit, "cursor": cursor}
        params = {name: str(value) for name, value in asked.items() if value is not None}
        return self._call(TaskPage, "GET", "api/tasks", params=params)

    def fetch(self, url: str) -> bytes:
        """Return what is at `url`, a picture's URL as a status gives it."""
        return self._send("GET", url).content

    def images(self, view: TaskView) -> list[bytes]:
        """Return the pictures of a succeeded task; raises ClientError when one arrives damaged."""
        pictures = []
        for image in view.images:
            data = self.fetch(image.url)
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise ClientError(f"{image.url} arrived damaged: its SHA-256 is not the one in the status")
            pictures.append(data)
        return pictures

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[TaskView], None] | None = None,
        **fields: Any,
    ) -> Generated:
        """Submit, wait and fetch; raises TaskFailed when there is no picture, NotInTime after `timeout_s`."""
        view = self.wait(self.submit(prompt, **fields).task_id, timeout_s, on_progress)
        if view.status is not TaskStatus.SUCCEEDED:
            raise TaskFailed(view)
        return Generated(view=view, images=self.images(view))

    def queue(self) -> list[QueueDepth]:
        """Return every queue with its depth and the age of its oldest task."""
        return self._list(QueueDepth, "api/queue", "queues")

    def workers(self) -> list[WorkerCard]:
        """Return the live workers."""
        return self._list(WorkerCard, "api/workers", "workers")

    def models(self) -> list[ModelView]:
        """Return the models that can be asked for."""
        return self._list(ModelView, "api/models", "models")

    def templates(self) -> list[TemplateView]:
        """Return the prompt templates."""
        return self._list(TemplateView, "api/templates", "templates")

    def fleet(self) -> Fleet:
        """Return the whole fleet in one picture."""
        return self._call(Fleet, "GET", "api/fleet")

    def history(self) -> History:
        """Return how the fleet did in the last quarter of an hour."""
        return self._call(History, "GET", "api/history", params={"window": "15m"})

    def health(self) -> Health:
        """Return the fleet's health, also when it is bad."""
        return self._call(Health, "GET", "health", whatever=True)

    def ready(self) -> str | None:
        """Return None when the fleet takes and carries out tasks, else why not. Tries once."""
        try:
            self._once("GET", urljoin(self.url, "ready"), CONNECT_TIMEOUT_S)
        except (Refused, Unreachable) as error:
            return error.message
        return None

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, model: type[M], method: str, path: str, **options: Any) -> M:
        response = self._send(method, path, **options)
        try:
            # what a newer gateway says beyond this client's knowledge is no error
            return model.model_validate_json(response.content, extra="ignore")
        except ValidationError:
            raise self._stranger(response) from None

    def _list(self, model: type[M], path: str, name: str) -> list[M]:
        response = self._send("GET", path)
        try:
            rows = TypeAdapter(dict[str, list[dict[str, Any]]]).validate_json(response.content)[name]
            return [model.model_validate(row, extra="ignore") for row in rows]
        except (ValidationError, KeyError):
            raise self._stranger(response) from None

    def _send(
        self, method: str, path: str, *, repeatable: bool = True, extra_s: float = 0.0, **options: Any
    ) -> requests.Response:
        """Send until answered; `repeatable` says whether a request whose answer got lost may be sent again."""
        url = urljoin(self.url, path)
        began = time.monotonic()
        pause = FIRST_PAUSE_S
        while True:
            budget_s = self._timeout_s + extra_s if self._reached else min(self._timeout_s, FIRST_CONTACT_S)
            try:
                return self._once(method, url, self._timeout_s + extra_s, **options)
            except Unreachable as error:
                failure: Unreachable | Refused = error
                again = repeatable
            except Refused as error:
                failure = error
                again = error.later
                budget_s = self._timeout_s + extra_s
                pause = error.retry_after_s or pause
            if not again or time.monotonic() + pause - began > budget_s:
                raise failure
            time.sleep(pause)
            pause = min(LONGEST_PAUSE_S, pause * 1.5)

    def _once(
        self, method: str, url: str, timeout_s: float, *, whatever: bool = False, **options: Any
    ) -> requests.Response:
        """Send once; `whatever` takes any status for an answer."""
        try:
            timeouts = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
            response = self._session.request(method, url, timeout=timeouts, **options)
        except requests.RequestException as error:
            raise Unreachable(
                f"no gateway answers at {self.url.rstrip('/')} ({_cause(error)}); is it running, is ZFLEET_URL right?"
            ) from error
        self._reached = True
        if response.ok or whatever:
            return response
        try:
            problem = Problem.model_validate_json(response.content, extra="ignore")
        except ValidationError:
            raise self._stranger(response) from None
        raise Refused(problem, _retry_after_s(response))

    def _stranger(self, response: requests.Response) -> Refused:
        """Whatever answers there is no zfleet gateway, or a proxy speaks for it."""
        said = f"{response.status_code} {response.reason}".strip()
        path = urlsplit(response.url).path
        detail = f"{self.url.rstrip('/')} does not answer as a zfleet gateway does ({said} for {path})"
        problem = Problem(
            type="about:blank", title=said, status=response.status_code, detail=detail, code="not_a_gateway"
        )
        return Refused(problem, _retry_after_s(response))


class _Key(AuthBase):
    """Shows the API key to one host, in the header that requests itself takes off when a redirect leads elsewhere."""

    def __init__(self, url: str, api_key: str) -> None:
        if not api_key.isascii() or not api_key.isprintable():
            raise ConfigurationError("the API key (ZFLEET_API_KEY) is none: it looks like zfk_…, in plain letters")
        self._origin = _origin(url)
        self._header = f"Bearer {api_key}"

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        if request.url and _origin(request.url) == self._origin:
            request.headers["Authorization"] = self._header
        return request


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _take_files(body: dict[str, Any]) -> list[tuple[str, tuple[str, bytes]]]:
    """Take the pictures that are files out of a request; return them as a form's parts."""
    files = []
    for field in FIELDS:
        if field in body:
            given = body.pop(field)
            several = given if isinstance(given, list | tuple) else [given]
            files += [(field, (one.name, pictures.read(one))) for one in several if isinstance(one, Path)]
            if others := [one for one in several if not isinstance(one, Path)]:
                body[field] = others if given is several else others[0]
    return files


def _part(text: str) -> str:
    """Return a task id as one part of a path, whatever was typed."""
    return quote(text, safe="") or "-"


def _retry_after_s(response: requests.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None  # the form with a date is for caches, not for queues


def _cause(error: requests.RequestException) -> str:
    """Return the innermost reason in a few words: urllib3 wraps it four deep."""
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)) is not None:
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror.lower()
    if isinstance(error, requests.Timeout):
        return "timed out"
    return str(inner) or type(inner).__name__
