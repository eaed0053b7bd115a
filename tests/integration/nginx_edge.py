"""Nginx itself, started from the rendered configuration on a free loopback port, and what surrounds it in a test."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

from common.problem import Problem

HERE = Path(__file__).parent
SCRIPT = HERE.parent.parent / "deploy" / "nginx" / "render.py"
ROOT = os.geteuid() == 0
USER = getpass.getuser() if ROOT else None  # any other user and Nginx could not read pytest's 0700 directories


def load_render() -> ModuleType:
    """Import deploy/nginx/render.py, which lives in no package."""
    spec = importlib.util.spec_from_file_location("nginx_render", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render().render


def nginx_binary() -> str:
    """Return the path of nginx; its absence is a failure, never a skip."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.fail("nginx is not installed: the fleet's entry point cannot be tested (apt-get install nginx-light)")
    return binary


def free_port() -> int:
    """Return a loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Run `command` until the block ends; enter it once `port` accepts connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 15
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} did not come up"
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)


@dataclasses.dataclass(frozen=True)
class Edge:
    """A running Nginx."""

    port: int
    run: Path
    results: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_of(self, request_id: str) -> dict[str, Any]:
        """Return the access log's line for a request id, waiting a moment for it."""
        for _ in range(100):
            for line in (self.run / "access.log").read_bytes().decode("ascii").splitlines():
                entry: dict[str, Any] = json.loads(line)
                if entry["request_id"] == request_id:
                    return entry
            time.sleep(0.02)
        raise AssertionError(f"no log line for {request_id}")

    def raw(self, data: bytes, timeout: float = 5) -> bytes:
        """Send bytes as they are, and return all that comes back until Nginx closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def get_raw(self, path: str) -> bytes:
        """GET a path that a well-behaved client would have normalised first."""
        return self.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"))


@contextlib.contextmanager
def nginx(run: Path, *gateways: int, edit: tuple[str, str] = ("", ""), **options: Any) -> Iterator[Edge]:
    """Run Nginx in front of gateways on these ports; `edit` replaces a piece of the rendered text."""
    port, results = free_port(), run / "results of the fleet"
    results.mkdir(parents=True)
    defaults = {"listen": f"127.0.0.1:{port}", "user": USER, "rate": "1000r/s", "worker_processes": "1"}
    hosts = [f"127.0.0.1:{gateway}" for gateway in gateways]
    text = render(gateways=hosts, results_dir=results, run_dir=run, **defaults | options)
    assert edit[0] in text
    (run / "nginx.conf").write_text(text.replace(*edit) if edit[0] else text)
    with running([nginx_binary(), "-p", str(run), "-c", str(run / "nginx.conf"), "-g", "daemon off;"], port):
        yield Edge(port, run, results)
    errors = (run / "error.log").read_text()
    assert not re.search(r"\[(alert|emerg)\]", errors), errors


@contextlib.contextmanager
def stub_gateway() -> Iterator[int]:
    """Run the stub gateway under gunicorn; give its port."""
    port = free_port()
    options = ["-k", "gevent", "-w", "1", "--keep-alive", "75", "--log-level", "error", "--chdir", str(HERE)]
    with running([sys.executable, "-m", "gunicorn", *options, "-b", f"127.0.0.1:{port}", "stub_gateway:app"], port):
        yield port


def assert_problem(answer: requests.Response, status: int, code: str) -> None:
    """Check that an answer is Nginx's own problem document, and no page of HTML."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
    problem = Problem.model_validate(answer.json())  # the gateway's own form
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:zfleet:problem:{code}")
    assert (problem.title, problem.errors) == (http.client.responses[status], [])
    assert len(problem.detail) > 20
    assert (answer.headers["Cache-Control"], answer.headers["Server"]) == ("no-store", "nginx")


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 with openssl; return it and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    name = ["-subj", "/CN=zfleet test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = ["openssl", "req", *kind, *name, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key
