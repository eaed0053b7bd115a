"""The dashboard of a fleet that is open to its own machine, whose pictures lie in a bucket of a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Page, expect

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import BaseStorage
from tests.browser.conftest import SIZES, Visit
from tests.fleet import submit_many
from tests.s3server import BUCKET, S3Server, show_credentials
from tests.servers import GatewayServer, RedisServer, eventually
from tests.unit.gateway.fake_worker import PICTURE, FakeWorker

VisitFn = Callable[..., Visit]


@dataclass
class Open:
    """A fleet without keys."""

    url: str
    broker: Broker
    storage: BaseStorage

    def picture(self) -> str:
        """Have a task done; return its id."""
        (task_id,) = submit_many(self.broker, 1, model="simulated", format="webp", prompt="a red circle")
        assert FakeWorker(self.broker, self.storage).work() == task_id
        return task_id


@pytest.fixture(scope="module")
def open_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("bucket")
    with pytest.MonkeyPatch.context() as patch, S3Server(folder) as server, RedisServer(folder) as redis:
        show_credentials(patch)
        settings = Settings(
            redis_url=redis.url, data_dir=folder / "data", models=("simulated",), storage="s3",
            s3_url=f"s3://{BUCKET}/results", s3_endpoint=server.endpoint,
        )  # fmt: skip
        broker = Broker(settings)
        with GatewayServer(settings, folder / "gateway.log") as gateway:
            eventually(lambda: _up(gateway.url), within_s=60)
            yield Open(gateway.url, broker, open_storage(settings))
        broker.close()


def _up(url: str) -> bool:
    try:
        return requests.get(f"{url}/live", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def shown(seen: Visit, open_fleet: Open, address: str) -> Page:
    """Open a page of this fleet, which asks for no key."""
    seen.page.goto(f"{open_fleet.url}/{address}")
    seen.page.get_by_role("heading", level=1).wait_for()
    return seen.page


@pytest.mark.parametrize("size", list(SIZES))
def test_pictures_in_a_bucket_are_shown_and_saved_by_way_of_the_gateway(
    visit: VisitFn, open_fleet: Open, size: str
) -> None:
    seen, task_id = visit(size), open_fleet.picture()
    hosts: set[str] = set()
    seen.page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page = shown(seen, open_fleet, "#/tasks")
    expect(page.locator(".task img:visible").first).to_have_js_property("naturalWidth", 8)
    for address in (f"tasks/{task_id}", f"playground?task={task_id}"):
        page = shown(seen, open_fleet, f"#/{address}")
        expect(page.get_by_role("img", name="a red circle")).to_have_js_property("naturalWidth", 8)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == f"{task_id}-0.webp"
        assert download.value.path().read_bytes() == PICTURE
    assert hosts <= {urlsplit(open_fleet.url).netloc, ""}, "blobs are of no host"
    open_fleet.storage.sweep(-60)
    late = visit(size)
    late.expected.append("status of 410")
    page = shown(late, open_fleet, f"#/tasks/{task_id}")
    expect(page.get_by_text("the picture is not in storage any more")).to_be_visible()


def test_with_the_first_key_the_page_goes_on_and_nobody_else_does(visit: VisitFn, open_fleet: Open) -> None:
    page = shown(visit("phone"), open_fleet, "#/operate")
    page.get_by_role("button", name="New key …").click()
    dialog = page.get_by_role("dialog", name="New API key")
    expect(dialog).to_contain_text("nobody is served without one any more")
    expect(dialog.get_by_label("Admin")).to_be_checked()
    dialog.get_by_label("Tenant").fill("operators")
    dialog.get_by_role("button", name="Make the key").click()
    page.get_by_role("dialog").get_by_role("button", name="I have kept it").click()
    expect(page.get_by_role("region", name="Keys", exact=True).get_by_role("row")).to_have_count(2)
    page.get_by_role("navigation").get_by_role("link", name="Tasks").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    other = visit().page
    eventually(lambda: (other.goto(open_fleet.url), other.get_by_label("API key").is_visible())[1], within_s=30)
