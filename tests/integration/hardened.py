"""The real gateway behind the real Nginx, for tests of what both withstand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import requests

from common.settings import Settings
from tests.integration.nginx_edge import Edge, nginx
from tests.servers import GatewayServer, eventually


class Front(NamedTuple):
    """A gateway, and the Nginx in front of it."""

    gateway: GatewayServer
    edge: Edge

    @property
    def ports(self) -> tuple[int, int]:
        return self.gateway.port, self.edge.port


@contextlib.contextmanager
def front(settings: Settings, folder: Path, **nginx_options: Any) -> Iterator[Front]:
    """Run both until the block ends; enter it once the gateway answers."""
    folder.mkdir(parents=True, exist_ok=True)
    with GatewayServer(settings, folder / "gateway.log") as gateway:
        eventually(lambda: answers(gateway.url), within_s=30)
        with nginx(folder / "edge", gateway.port, **nginx_options) as edge:
            yield Front(gateway, edge)


def answers(url: str) -> bool:
    """Whether a gateway is up."""
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.RequestException:
        return False
