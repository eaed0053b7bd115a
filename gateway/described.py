"""What /openapi.json says of a call beside its view's answers: the key it wants, and what comes before the view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from flask_openapi3.types import ResponseDict, SecuritySchemesDict

from common.errors import FleetError, Forbidden, RateLimited, RedisUnavailable, Unauthenticated
from gateway import problems
from gateway.admission import Scope

Documented = Callable[..., ResponseDict]  # like problems.documented, in the form that an API's errors have

SCHEMES: SecuritySchemesDict = {  # the ways to show a key; a fleet for which none was made wants none
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "zfk_<id>_<secret>"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}  # of a stream, as OpenAPI describes one: as its fields


def whole(view: Callable[..., Any], options: dict[str, Any], documented: Documented) -> dict[str, Any]:
    """Return a call's options for flask-openapi3 with what admission and HTTP itself add to its description."""
    scope: Scope = getattr(view, "scope", "tenant")
    refused: list[type[FleetError] | int] = [*problems.EVERYWHERE]
    if scope != "public":
        refused += [Unauthenticated, Forbidden, RedisUnavailable]  # an open fleet refuses other sites' pages
    if hasattr(view, "submits"):
        refused.append(RateLimited)
    if "body" in get_type_hints(view):
        refused += problems.BODY
    responses = together(documented(), documented(*refused), options.get("responses") or {})
    return options | {"responses": responses, "security": _security(scope)}


def together(*described: ResponseDict) -> ResponseDict:
    """Return several descriptions as one: a status has the codes of all; a later one by a model takes its place."""
    found: ResponseDict = {}
    for status, response in (pair for one in described for pair in one.items()):
        earlier = found.get(str(status))
        if isinstance(earlier, dict) and isinstance(response, dict):
            codes = [*str(earlier["description"]).split(", "), *str(response["description"]).split(", ")]
            response = {**response, "description": ", ".join(dict.fromkeys(codes))}
        found[str(status)] = response
    return found


def _security(scope: Scope) -> list[dict[str, list[str]]]:
    """Return the keys that a call wants, any one of these."""
    needed = ["admin"] if scope == "admin" else []
    return [] if scope == "public" else [{name: needed} for name in SCHEMES]
