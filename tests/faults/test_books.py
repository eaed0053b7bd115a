"""The audit can fail: it finds what is wrong with broken fleets and with books that were cooked by hand."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common import keys
from common.broker import RECONCILE_GRACE_S
from tests.faults import table
from tests.faults.books import Books, Ledger, Mix, Report, gradient, picture_fault
from tests.faults.rig import Rig, frozen, sabotage, within
from tests.fleet import record
from tests.servers import eventually
from worker.encoding import encode


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A fleet that has done a little work, all of it well."""
    with Rig(tmp_path_factory.mktemp("drained"), simulated_image_ms=20.0) as rig:
        rig.supervise()
        with rig.load(rate_s=30) as load:
            eventually(lambda: len(rig.ledger.accepted) >= 12)
        assert rig.close_books(load).balanced
        assert rig.supervisors[0].stop() == 0
        yield rig


class Cooked:
    """A fleet's books with one entry forged; `undo` makes them honest again."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.task_id = next(iter(rig.ledger.accepted))
        self.task = keys.TASK + self.task_id
        self.redis: Any = rig.redis.client
        (self.image, *_) = record(rig.broker, self.task_id).images
        self.file = rig.settings.results_dir / self.image.key
        self._fields = self.redis.hgetall(self.task)
        self._data = self.file.read_bytes()

    def set(self, **fields: object) -> None:
        self.redis.hset(self.task, mapping={name.replace("__", ":"): value for name, value in fields.items()})

    def attempt(self, **changes: object) -> str:
        return json.dumps(json.loads(self._fields["attempt:1"]) | changes)

    def undo(self) -> None:
        self.redis.delete(self.task, keys.LEASES, keys.OPEN)
        for prefix in (keys.RQ_STARTED, keys.RQ_QUEUE):
            for key in self.redis.keys(prefix + "*"):
                self.redis.delete(key)
        self.redis.hset(self.task, mapping=self._fields)
        self.file.write_bytes(self._data)
        for path in self.rig.settings.results_dir.rglob("stray*"):
            path.unlink()


def unknown(books: Cooked) -> None:
    books.redis.delete(books.task)


def still_queued(books: Cooked) -> None:
    books.set(status="queued")


def succeeded_twice(books: Cooked) -> None:
    books.set(fence=2, attempt__2=books.attempt())


def another_end(books: Cooked) -> None:
    books.set(status="failed", error=json.dumps({"code": "x", "message": "y"}), images="[]")


def failed_without_reason(books: Cooked) -> None:
    books.set(status="failed", images="[]", attempt__1=books.attempt(outcome="failed"))


def canceled_by_nobody(books: Cooked) -> None:
    books.set(status="canceled", images="[]", attempt__1=books.attempt(outcome="canceled"))


def open_attempt(books: Cooked) -> None:
    books.set(attempt__1=json.dumps({"worker": "w", "gpu": "cpu", "started_at": 1}))


def forgotten_attempt(books: Cooked) -> None:
    books.set(fence=2)


def no_file(books: Cooked) -> None:
    books.file.unlink()


def half_a_file(books: Cooked) -> None:
    books.file.write_bytes(books.file.read_bytes()[:-7])


def another_request(books: Cooked) -> None:
    request = json.loads(books.redis.hget(books.task, "request"))
    books.set(request=json.dumps(request | {"prompt": "another"}))


def stray_result(books: Cooked) -> None:
    (books.file.parent / "stray.png").write_bytes(b"whose?")


def stray_partial(books: Cooked) -> None:
    (books.file.parent / "stray.png.1.partial").write_bytes(b"half")


def stray_lease(books: Cooked) -> None:
    books.redis.zadd(keys.LEASES, {books.task_id: 1})


def stray_open(books: Cooked) -> None:
    books.redis.zadd(keys.OPEN, {books.task_id: 1})


def stray_start(books: Cooked) -> None:
    books.redis.zadd(keys.RQ_STARTED + "simulated.normal.default", {f"{books.task_id}:1": "+inf"})


def stray_entry(books: Cooked) -> None:
    books.redis.rpush(keys.RQ_QUEUE + "simulated.normal.default", books.task_id)


@pytest.mark.parametrize(
    ("forge", "kinds"),
    [
        (unknown, {"lost", "doubled"}),  # its file has lost its record
        (still_queued, {"lost"}),
        (succeeded_twice, {"doubled", "untrue"}),
        (another_end, {"doubled", "untrue"}),
        (failed_without_reason, {"doubled", "untrue"}),
        (canceled_by_nobody, {"doubled", "untrue"}),
        (open_attempt, {"untrue"}),
        (forgotten_attempt, {"untrue"}),
        (no_file, {"broken"}),
        (half_a_file, {"broken"}),
        (another_request, {"broken"}),
        (stray_result, {"doubled"}),
        (stray_partial, {"leftovers"}),
        (stray_lease, {"leftovers"}),
        (stray_open, {"leftovers"}),
        (stray_start, {"leftovers"}),
        (stray_entry, {"leftovers"}),
    ],
)
def test_a_forged_entry_is_found(drained: Rig, forge: Callable[[Cooked], None], kinds: set[str]) -> None:
    cooked = Cooked(drained)
    forge(cooked)
    try:
        report = honest(drained)
    finally:
        cooked.undo()
    assert not report.balanced
    assert found(report) >= kinds, report
    assert honest(drained).balanced, "the forgery was not undone"


def honest(rig: Rig) -> Report:
    """Audit without waiting: what is left is left."""
    with Books(rig.ledger, rig.url, rig.settings) as books:
        return books.close(settle_s=0.0)


def found(report: Report) -> set[str]:
    kinds = ("lost", "doubled", "broken", "leftovers", "untrue", "refused")
    return {kind for kind in kinds if getattr(report, kind)}


def test_a_picture_is_looked_at() -> None:
    request = {"prompt": "x", "model": "simulated", "width": 64, "height": 48, "steps": 4, "guidance_scale": 0.0}
    request |= {"format": "png"}

    def fault(data: bytes) -> str | None:
        return picture_fault({"seed": 7, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, request, data)

    drawn = encode(gradient(request, 7), "png", 85)
    assert fault(drawn) is None
    assert fault(encode(gradient(request, 8), "png", 85)) == "does not show what its seed gives"
    assert fault(encode(gradient(request | {"width": 48}, 7), "png", 85)) == "has the shape (48, 48, 3)"
    assert str(fault(drawn[:100])).startswith("cannot be decoded")


def test_a_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.write("sent", key="k", body={"prompt": "x"})
    ledger.write("accepted", key="k", task="t")
    ledger.write("final", task="t", status="succeeded", error_code=None, shas=["s"], total_ms=1.0)
    ledger.close()
    with (tmp_path / "ledger").open("ab") as file:
        file.write(b'{"event": "accep')
    again = Ledger(tmp_path / "ledger")
    assert (again.sent, again.accepted, again.finals["t"].shas) == ({"k": {"prompt": "x"}}, {"t": "k"}, ("s",))


def test_without_a_fence_a_thawed_worker_ends_a_task_twice(tmp_path: Path) -> None:
    """The same fault as in test_frozen_workers, on a fleet whose `finish` takes anybody's word."""
    with Rig(tmp_path, simulated_image_ms=800.0) as rig:
        rig.supervise(environment=sabotage("unfenced"))
        with rig.load(rate_s=1, mix=Mix(steps=(1,), pictures=(1,), priorities=("normal",))) as load:
            eventually(lambda: [card for card in rig.ready() if card.running], within_s=20)
            victim = next(card for card in rig.ready() if card.running)
            (task_id,) = [each for each in victim.running if record(rig.broker, each).status == "running"][:1]
            with frozen(victim.pid):
                within(lambda: record(rig.broker, task_id).status.final, 30)
                eventually(lambda: task_id in rig.ledger.finals)
        load.drain()
        # the thawed worker may have to make the whole picture before it ends the task again
        eventually(lambda: honest(rig).doubled, within_s=20)
        assert honest(rig).lost == 0


def test_without_a_reconciler_a_lost_queue_is_lost(tmp_path: Path) -> None:
    """`rq empty` takes tasks out of their queue; an honest supervisor puts them back."""
    with Rig(tmp_path, simulated_image_ms=400.0) as rig:
        rig.supervise(environment=sabotage("unreconciled"))
        with rig.load(rate_s=20, backlog=20) as load:
            eventually(lambda: rig.broker.pending() > 10, within_s=20)
        for key in rig.redis.client.keys(keys.RQ_QUEUE + "*"):
            rig.redis.client.delete(key)
        within(lambda: not any(card.running for card in rig.broker.workers()), 20)
        report = honest(rig)
        assert report.lost > 0, report
        time.sleep(RECONCILE_GRACE_S)
        rig.supervise()
        report = rig.close_books(load)
        assert report.lost == 0 and report.balanced, report


def test_a_row_tells_a_fault(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    row = table.Row(fault="kill -9", times=3, tasks=1200, lost=0, doubled=0, p50_s=0.5, max_s=1.25)
    table.write(page, [row], "make faults")
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n`make faults` on ") and text.endswith(f"{table.END}\nafter\n")
    assert "| kill -9 | 3 | 1,200 | 0 | 0 | 0.50 s | 1.25 s |" in text and "old" not in text
    assert f"{datetime.now(UTC):%Y}" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no place"):
        table.write(page, [row], "make faults")
