from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest
from flask.testing import FlaskClient

import gateway
from common.errors import ConfigurationError
from common.settings import Settings, load_settings
from gateway.api import Api
from gateway.app import _register, close, create_app


@pytest.mark.parametrize("name", ["base", "os", "../x", "nope", ""])
def test_an_unknown_dialect_is_told_with_the_known_ones(settings: Settings, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"there are: .*native"):
        create_app(settings.model_copy(update={"dialects": (name,)}))


def test_a_route_is_served_by_one_part_only(settings: Settings) -> None:
    app = create_app(settings)
    second = Api("second", "second", about="Another.")

    @second.get("/api/queue")
    def queue() -> None:
        """Take a route that is taken."""

    with pytest.raises(ConfigurationError, match=r"second and another part .* /api/queue"):
        _register(app, second)


def test_without_dialects_there_are_the_fleets_own_routes(settings: Settings) -> None:
    client = create_app(settings.model_copy(update={"dialects": ()})).test_client()
    assert client.get("/api/templates").status_code == 200
    assert client.post("/api/submit", json={"prompt": "x"}).status_code == 404


def test_making_an_app_connects_to_nothing() -> None:
    settings = load_settings({"redis_url": "redis://127.0.0.1:1/0", "models": ("simulated",)})
    app = create_app(settings)
    assert app.test_client().get("/openapi.json").status_code == 200
    close(app)


@pytest.mark.parametrize(
    "path", ["/api/templates/", "//api/templates", "/api//templates", "/API/templates", "/%00", "/ä"]
)
def test_an_odd_path_is_unknown_and_not_redirected(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


def test_a_gateway_needs_no_library_of_a_workers() -> None:
    names = [module.name for module in pkgutil.walk_packages(gateway.__path__, "gateway.")]
    ready = [name for name in names if name not in ("gateway.wsgi", "gateway.gunicorn_conf")]
    assert "gateway.dialects.native" in ready
    code = f"import importlib, sys\nfor name in {ready}: importlib.import_module(name)\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "worker", "zfleet", "rq"}


def test_every_module_says_what_it_is_for() -> None:
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        if module.name not in ("gateway.wsgi", "gateway.gunicorn_conf"):
            assert importlib.import_module(module.name).__doc__, module.name
