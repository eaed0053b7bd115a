"""Fixtures that chain on: broker -> app -> client, and a worker beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from gateway.app import close, create_app
from gateway.diskguard import DiskGuard
from gateway.inputs import Inputs
from gateway.waiting import Hub
from tests.unit.gateway.fake_worker import FakeWorker
from tests.unit.gateway.openai_calls import Diligent


@pytest.fixture(autouse=True)
def nobody_goes_on_listening(described_once: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close every hub that a test makes, whatever application it is of: its threads ask the Redis that tests share."""
    hubs: list[Hub] = []

    class Noted(Hub):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            hubs.append(self)

    monkeypatch.setattr("gateway.tasks.Hub", Noted)
    yield
    for hub in hubs:
        hub.close()


@pytest.fixture
def app(settings: Settings, broker: Broker) -> Iterator[OpenAPI]:
    app = create_app(settings, broker)
    yield app
    close(app)  # else what looks at the fleet goes on beside the tests that follow


@pytest.fixture
def disk(settings: Settings) -> DiskGuard:
    return DiskGuard(open_storage(settings), settings)


@pytest.fixture
def pictures(settings: Settings, disk: DiskGuard) -> Inputs:
    return Inputs(open_storage(settings), disk, settings)


@pytest.fixture
def client(app: OpenAPI) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def worker(broker: Broker, settings: Settings) -> FakeWorker:
    return FakeWorker(broker, open_storage(settings))


@pytest.fixture
def diligent(worker: FakeWorker) -> Iterator[Diligent]:
    with Diligent(worker) as diligent:
        yield diligent
