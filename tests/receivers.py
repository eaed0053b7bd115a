"""A real receiver of webhooks on loopback, over HTTPS, that behaves as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from standardwebhooks import Webhook

Behaviour = Callable[["Handler"], None]
HOST = "hooks.example"


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for hooks.example and 127.0.0.1 with openssl; return it and its key."""
    cert, key = folder / "receiver.pem", folder / "receiver.key"
    names = f"subjectAltName=DNS:{HOST},DNS:localhost,IP:127.0.0.1"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(cert)]
    command = ["openssl", "req", *kind, "-subj", "/CN=receiver", "-addext", names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class Heard:
    """One request that arrived."""

    def __init__(self, path: str, headers: Mapping[str, str], body: str, server_name: str | None) -> None:
        self.path = path
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body
        self.server_name = server_name  # what TLS was asked for
        self.at = time.monotonic()

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> Any:
        return json.loads(self.body)

    def verified(self, secret: str) -> Any:
        """What the library makes of it; raises WebhookVerificationError."""
        return Webhook(secret).verify(self.body, self.headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name = self.server.names.pop(self.client_address, None)
        self.server.heard.append(Heard(self.path, dict(self.headers), body, name))
        self.close_connection = True
        with contextlib.suppress(OSError):  # the courier may hang up
            self.server.behaviour(self)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int = 200, body: bytes = b"ok", **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Receiver(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1; `behaviour` may be changed at any time."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path | None = None, behaviour: Behaviour = Handler.answer) -> None:
        """With a folder it makes itself a certificate there and speaks HTTPS, else HTTP."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.heard: list[Heard] = []
        self.names: dict[Any, str | None] = {}
        self.released = threading.Event()
        self.port = int(self.server_address[1])
        self.certificate: Path | None = None
        if folder is not None:
            self.certificate, _ = certificate(folder)

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://{self.netloc}/told?token=s3cret"

    def hang(self, _handler: Handler) -> None:
        """A behaviour: answer nothing, until the test is over."""
        self.released.wait()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.certificate is None:
            super().finish_request(request, client_address)
            return
        asked: list[str | None] = []
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.certificate.with_suffix(".key"))
        context.sni_callback = lambda _socket, name, _context: asked.append(name)
        try:
            with context.wrap_socket(request, server_side=True) as wrapped:
                self.names[client_address] = asked[0] if asked else None
                super().finish_request(wrapped, client_address)
        except OSError:  # who asks does not like our certificate
            pass

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
