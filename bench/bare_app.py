"""A bare Flask view that answers a small JSON to a POST: what submit through gunicorn is compared with."""

from __future__ import annotations

from flask import Flask, Response, jsonify, request

app = Flask(__name__)


@app.post("/api/submit")
def submit() -> tuple[Response, int]:
    """Read the JSON and answer as much as a submit does, having done nothing."""
    prompt = request.get_json()["prompt"]
    task_id = "0123456789abcdef0123456789abcdef"
    answer = {
        "task_id": task_id, "status": "queued", "status_url": f"/api/status/{task_id}",
        "events_url": f"/api/tasks/{task_id}/events", "cancel_url": f"/api/cancel/{task_id}",
        "position": len(prompt), "eta_seconds": None,
    }  # fmt: skip
    return jsonify(answer), 202
