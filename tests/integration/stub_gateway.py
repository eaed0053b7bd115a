"""A stand-in for the gateway behind the real Nginx: it shows what arrived and answers what a test needs.

Run by test_nginx.py as `gunicorn -k gevent -w 1 stub_gateway:app`: one process, so its lists see every request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import quote

from flask import Flask, Response, jsonify, request

app = Flask(__name__)
submitted: list[str] = []  # the Idempotency-Key of every POST that got here, "" without one

METHODS = ["GET", "POST", "PUT", "DELETE"]
EVENT_GAP_S = 0.4


@app.before_request
def remember() -> Response | None:
    """Note every POST that arrives whole; show a WebSocket's request, which would match no route."""
    if request.method == "POST":
        request.get_data()
        submitted.append(request.headers.get("Idempotency-Key", ""))
    return echo() if request.headers.get("Upgrade") == "websocket" else None


@app.get("/stub/submitted")
def show_submitted() -> Response:
    """Return what was submitted so far."""
    return jsonify(submitted)


@app.route("/echo", methods=METHODS)
def echo() -> Response:
    """Return the request as it arrived, and the port of the connection it came by."""
    answer = jsonify(
        headers=dict(request.headers), query=request.query_string.decode(), port=request.environ["REMOTE_PORT"]
    )
    answer.headers["X-Request-ID"] = "the-gateways-own-echo"
    return answer


@app.post("/api/submit")
@app.post("/api/cancel/<task_id>")
@app.post("/v1/images/generations")
def accept(task_id: str = "t1") -> tuple[Response, int]:
    """Accept anything, and say how long its body was."""
    return jsonify(task_id=task_id, length=len(request.get_data())), 202


@app.get("/api/status/<task_id>")
def status(task_id: str) -> Response:
    """Hold the answer back for `wait` seconds."""
    time.sleep(float(request.args.get("wait", "0")))
    return jsonify(task_id=task_id, status="succeeded")


@app.get("/api/tasks/<task_id>/events")
@app.get("/dialect/<task_id>/stream")
def events(task_id: str) -> Response:
    """Send three events, each with the time at which it was sent."""

    def stream() -> Iterator[str]:
        for _ in range(3):
            yield f"event: progress\ndata: {time.time()}\n\n"
            time.sleep(EVENT_GAP_S)

    answer = Response(stream(), mimetype="text/event-stream")
    if request.path.startswith("/dialect/"):
        answer.headers["X-Accel-Buffering"] = "no"
    return answer


@app.get("/view/<path:name>")
def view(name: str) -> Response:
    """Leave the image to Nginx; `at` names the internal address as it is, for the ones a gateway should never send."""
    answer = Response(mimetype="image/webp")
    answer.headers["X-Accel-Redirect"] = request.args.get("at", "/_results/" + quote(name))
    answer.headers["Cache-Control"] = "private, max-age=60, immutable"
    return answer


@app.get("/big")
def big() -> Response:
    """Return JSON that is worth compressing."""
    return jsonify(tasks=["task"] * 2000)


@app.get("/busy/<int:code>")
def busy(code: int) -> Response:
    """Fail as the gateway itself would, with a problem of its own."""
    answer = Response('{"code": "the_gateways_own"}', status=code, mimetype="application/problem+json")
    answer.headers["Retry-After"] = "7"
    answer.headers["Cache-Control"] = "max-age=1"
    return answer
