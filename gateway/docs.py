"""/openapi.json, drawn from the schemas, and /docs, where it can be read and tried. Nothing comes from elsewhere."""

from __future__ import annotations

import json
from importlib import resources

from flask import Blueprint, Response, send_from_directory
from flask_openapi3.openapi import OpenAPI

from gateway.admission import open_to
from gateway.bodies import JSON

ASSETS = str(resources.files("flask_openapi3_swagger") / "templates" / "swagger")

# no validator badge: Swagger UI would send the description to a server of its makers
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>zfleet API</title>
<link rel="icon" href="docs/assets/images/swagger.svg">
<link rel="stylesheet" href="docs/assets/css/swagger-ui.css">
<div id="ui"></div>
<script src="docs/assets/js/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
START = """window.ui = SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null});
"""
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def install(app: OpenAPI) -> None:
    """Add the two addresses. The description is drawn once, when first asked for."""
    pages = Blueprint("docs", __name__)
    drawn: list[bytes] = []

    @pages.get("/openapi.json")
    @open_to("public")
    def description() -> Response:
        if not drawn:
            drawn.append(json.dumps(app.api_doc, ensure_ascii=False, separators=(",", ":")).encode())
        return Response(drawn[0], content_type=JSON)

    @pages.get("/docs")
    @open_to("public")
    def page() -> Response:
        return Response(PAGE, headers={"Content-Security-Policy": POLICY}, content_type="text/html; charset=utf-8")

    @pages.get("/docs/start.js")
    @open_to("public")
    def start() -> Response:
        return Response(START, content_type="text/javascript; charset=utf-8")

    @pages.get("/docs/assets/<path:name>")
    @open_to("public")
    def asset(name: str) -> Response:
        return send_from_directory(ASSETS, name)

    app.register_blueprint(pages)
