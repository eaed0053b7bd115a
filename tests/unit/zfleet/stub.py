"""A gateway that answers what a test has told it, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

PIXELS = b"not really a picture"
TASK = "0123456789abcdef0123456789abcdef"


@dataclass(kw_only=True)
class Reply:
    """One answer; `drop` closes the connection without any."""

    status: int = 200
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False


@dataclass(kw_only=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class StubGateway:
    """Gives `replies` in order, then the last one again and again."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = deque(replies)
        self.asked: list[Asked] = []
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = read(self.headers.get("Content-Type", ""), self.rfile.read(length)) if length else None
                stub.asked.append(Asked(method=self.command, path=self.path, headers=dict(self.headers), body=body))
                reply = stub.replies.popleft() if len(stub.replies) > 1 else stub.replies[0]
                if reply.drop:
                    self.close_connection = True
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET  # noqa: N815 - the base class's name

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def read(content_type: str, raw: bytes) -> Any:
    """JSON as it is; of a form its `request` as JSON, and a list of (name, bytes) for each name of a file."""
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        return json.loads(raw)
    texts, files = MultiPartParser().parse(io.BytesIO(raw), options["boundary"].encode(), len(raw))
    parts: dict[str, Any] = {name: json.loads(text) for name, text in texts.items()}
    for name, file in files.items(multi=True):
        parts.setdefault(name, []).append((file.filename, file.stream.read()))
    return parts


def accepted() -> Reply:
    body = {
        "task_id": TASK,
        "status": "queued",
        "status_url": f"/api/status/{TASK}",
        "events_url": f"/api/tasks/{TASK}/events",
        "cancel_url": f"/api/cancel/{TASK}",
        "position": 0,
        "eta_seconds": None,
    }
    return Reply(status=202, body=body)


def problem(status: int, code: str, detail: str = "no", **extra: Any) -> Reply:
    headers = extra.pop("headers", {})
    body = {"type": "about:blank", "title": "No", "status": status, "detail": detail, "code": code, **extra}
    return Reply(status=status, body=body, headers=headers)


def view(status: str, step: int = 0, *, pictures: int = 1, **changes: Any) -> Reply:
    now = datetime.now(UTC).isoformat()
    images = [
        {
            "url": f"/view/{TASK}/{index}.webp", "width": 64, "height": 64, "format": "webp", "bytes": len(PIXELS),
            "sha256": hashlib.sha256(PIXELS).hexdigest(), "seed": 1 + index,
        }
        for index in range(pictures)
    ]  # fmt: skip
    request = {
        "prompt": "a cat", "model": "simulated", "width": 64, "height": 64, "steps": 4, "guidance_scale": 0.0,
        "seed": 1, "n": pictures, "format": "webp", "quality": 85, "priority": "normal",
    }  # fmt: skip
    body = {
        "task_id": TASK, "status": status, "model": "simulated", "progress": {"step": step, "steps": 4},
        "position": 2 if status == "queued" else None, "eta_seconds": None, "attempts": [],
        "images": images if status == "succeeded" else [], "error": None, "warnings": [], "timings": {},
        "request": request, "created_at": now, "started_at": None, "finished_at": None, "expires_at": None,
    }  # fmt: skip
    return Reply(body=body | changes)
