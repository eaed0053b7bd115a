"""A whole fleet whose pictures lie in a bucket: through gunicorn, a worker, and links to the S3 server itself."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from tests.fleet import ready_workers
from tests.s3server import BUCKET, S3Server, show_credentials
from tests.samples import encoded
from tests.servers import GatewayServer, WorkerServer, eventually


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Iterator[tuple[GatewayServer, Settings]]:
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path) as server:
        show_credentials(patch)
        changes = {"storage": "s3", "s3_url": f"s3://{BUCKET}/results", "s3_endpoint": server.endpoint}
        settings = settings.model_copy(update={**changes, "models": ("simulated",), "housekeeping_s": 0.5})
        gateway, worker = GatewayServer(settings, tmp_path / "gateway.log"), WorkerServer(settings, tmp_path / "w.log")
        with gateway, worker:
            ready_workers(Broker(settings))
            yield gateway, settings


def test_pictures_go_into_the_bucket_and_come_from_it_and_so_do_those_to_start_from(
    fleet: tuple[GatewayServer, Settings],
) -> None:
    gateway, settings = fleet
    eventually(lambda: _up(gateway.url), within_s=30)
    began = time.monotonic()
    task = requests.post(f"{gateway.url}/api/submit", json={"prompt": "a red circle", "n": 2}, timeout=10).json()
    status = requests.get(f"{gateway.url}/api/status/{task['task_id']}?wait=30", timeout=40).json()
    assert status["status"] == "succeeded", status["error"]
    assert time.monotonic() - began < 20
    for image in status["images"]:
        answer = requests.get(gateway.url + image["url"], allow_redirects=False, timeout=10)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (302, "no-store")
        fetched = requests.get(answer.headers["Location"], timeout=10)
        assert hashlib.sha256(fetched.content).hexdigest() == image["sha256"]
        here = requests.get(f"{gateway.url}{image['url']}?via=gateway", allow_redirects=False, timeout=10)
        assert (here.status_code, here.content) == (200, fetched.content)
        again = {"If-None-Match": here.headers["ETag"]}
        assert requests.get(f"{gateway.url}{image['url']}?via=gateway", headers=again, timeout=10).status_code == 304
    assert not settings.results_dir.exists(), "nothing was kept on this machine's disk"
    assert open_storage(settings).sweep(-60) == 2
    gone = requests.get(f"{gateway.url}{status['images'][0]['url']}?via=gateway", timeout=10)
    assert (gone.status_code, gone.json()["code"]) == (410, "task_expired")
    kind = {"Content-Type": "image/png"}
    answer = requests.post(f"{gateway.url}/api/images", data=encoded(), headers=kind, timeout=10)
    assert answer.status_code == 201, answer.text
    assert open_storage(settings).sweep(-60) == 1


def _up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False
