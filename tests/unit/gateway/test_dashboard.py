from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.broker import Broker
from common.settings import Settings
from gateway.app import create_app
from gateway.dashboard import FILES, POLICY
from tests.tenants import new_key

WEIGHT_BYTES = 200 * 1024


@pytest.fixture
def client(settings: Settings, broker: Broker) -> FlaskClient:
    app: OpenAPI = create_app(settings, broker)
    new_key(broker)
    return app.test_client()


def test_the_page_and_its_files_want_no_key_and_may_load_from_here_alone(client: FlaskClient) -> None:
    for path in ("/", "/web/app.css", "/web/js/app.js"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["Content-Security-Policy"]) == (200, POLICY)
        assert client.get(path, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/", "/web/../dashboard.py", "/web/%2e%2e/dashboard.py"])
def test_no_other_file_is_served(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code in (401, 404)


def test_all_of_it_weighs_less_than_200_kb() -> None:
    assert sum(file.stat().st_size for file in Path(FILES).rglob("*") if file.is_file()) < WEIGHT_BYTES
