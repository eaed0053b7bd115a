"""The dashboard: a page and its files out of gateway/web/. It is a client of the public API like any other.

The page holds no data and wants no key; what it shows it asks for with the key that its reader signs in with.
"""

from __future__ import annotations

from importlib import resources

from flask import Blueprint, Response, send_from_directory
from flask_openapi3.openapi import OpenAPI

from gateway.admission import open_to

FILES = str(resources.files("gateway") / "web")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def install(app: OpenAPI) -> None:
    """Add the page at `/`, and what it is made of under `/web/`."""
    pages = Blueprint("dashboard", __name__)

    @pages.get("/")
    @open_to("public")
    def page() -> Response:
        return _file("index.html")

    @pages.get("/web/<path:name>")
    @open_to("public")
    def file(name: str) -> Response:
        return _file(name)

    app.register_blueprint(pages)


def _file(name: str) -> Response:
    answer = send_from_directory(FILES, name)
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["Cache-Control"] = "no-cache"  # asked for anew, and answered by 304 until it has changed
    return answer
