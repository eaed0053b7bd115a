"""The audit: what the clients were promised against what the fleet did, once it has drained.

    accepted = succeeded + failed (with a reason) + canceled + expired

and every task ended once, with at most one visible result whose files are whole and show what was asked for; nothing is
left behind; and the attempts tell what happened. States and pictures are read over public HTTP, as a client would;
leases, queues and files, which no client sees, from Redis and from the results folder.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import redis
import requests
from numpy.typing import NDArray
from PIL import Image

from common import keys
from common.broker import Broker
from common.models import load_catalogue
from common.schemas import TaskRecord
from common.settings import Settings
from common.storage.local import PARTIAL
from tests.faults.ledger import Final, Ledger
from tests.faults.load import Load, Mix
from worker.pipelines.base import ImageRequest
from worker.pipelines.simulated import Pipeline

__all__ = ["Books", "Final", "Finding", "Ledger", "Load", "Mix", "Report", "audit"]

FINAL = ("succeeded", "failed", "canceled", "expired")
LEFTOVERS_GO_S = 5.0  # a run that has just been refused may still be removing its files
PAGE = 200

Kind = Literal["lost", "doubled", "broken", "leftover", "untrue", "refused"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one task, file or key."""

    kind: Kind
    subject: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The closed books. Figures count tasks (or files and keys, for leftovers); `problems` says what is wrong."""

    accepted: int
    succeeded: int
    failed: int
    canceled: int
    expired: int
    lost: int  # acknowledged, and unknown, unseen or never final
    doubled: int  # ended twice, two tasks for one key, or a result that no record names
    broken: int  # a picture that is missing, not whole, or not what was asked for
    leftovers: int  # leases, queue entries, temporary files
    untrue: int  # attempts or causes that cannot have been so
    refused: int  # answers that no fault explains
    outcomes: Mapping[str, int]  # of all attempts at accepted tasks
    problems: list[str]

    @property
    def balanced(self) -> bool:
        ended = self.succeeded + self.failed + self.canceled + self.expired
        return not self.problems and self.accepted == ended

    @property
    def attempts(self) -> int:
        """More than there are tasks means that something was begun again."""
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in vars(self).items() if isinstance(value, int))
        figures += f"; attempts {dict(self.outcomes)}"
        return "\n".join([figures, *self.problems[:40]])


def audit(ledger: Ledger, url: str, settings: Settings, *, settle_s: float = LEFTOVERS_GO_S) -> Report:
    """Close the books of a fleet that has drained: `url` is its gateway, `settings` say where its Redis and files are.

    Leftovers have `settle_s` to go away by themselves; nothing else is waited for.
    """
    with Books(ledger, url, settings) as books:
        return books.close(settle_s)


class Books:
    """One audit. Every check adds findings; none stops the others."""

    def __init__(self, ledger: Ledger, url: str, settings: Settings) -> None:
        self._ledger = ledger
        self._url = url
        self._results = settings.results_dir
        self._retention_s = settings.retention_days * 86_400
        self._redis: Any = redis.Redis.from_url(settings.redis_url, decode_responses=True)
        self._broker = Broker(settings)
        self._http = requests.Session()
        self._findings: list[Finding] = []

    def __enter__(self) -> Books:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._broker.close()
        self._redis.close()

    def close(self, settle_s: float) -> Report:
        """Run every check and return the report."""
        views = {task_id: self._view(task_id) for task_id in {*self._ledger.accepted, *self._listed()}}
        records = {task_id: self._broker.view(task_id) for task_id in views}
        for task_id, view in views.items():
            record = records[task_id]
            if view is None or record is None:
                if not self._retired(task_id):
                    self._find("lost", task_id, "acknowledged, and unknown now")
            elif self._check_end(task_id, view):
                self._check_attempts(task_id, view)
                self._check_pictures(task_id, view, record)
        self._check_keys(views)
        self._settle(settle_s, records)
        for key, why in self._ledger.refused.items():
            self._find("refused", key, why)
        return self._report(views)

    def _retired(self, task_id: str) -> bool:
        """Whether a client saw it end, and it has been kept for as long as was promised since."""
        final = self._ledger.finals.get(task_id)
        return final is not None and time.time() - final.at > self._retention_s

    def _find(self, kind: Kind, subject: str, what: str) -> None:
        self._findings.append(Finding(kind, subject, what))

    # What a client sees

    def _view(self, task_id: str) -> dict[str, Any] | None:
        answer = self._http.get(f"{self._url}/api/status/{task_id}", timeout=10)
        if answer.status_code in (404, 410):
            return None
        assert answer.status_code == 200, f"the fleet is not fit to be audited: {answer.status_code} {answer.text}"
        view: dict[str, Any] = answer.json()
        return view

    def _listed(self) -> list[str]:
        ids: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            params = {"limit": PAGE} | ({"cursor": cursor} if cursor else {})
            page = self._http.get(f"{self._url}/api/tasks", params=params, timeout=10).json()
            ids += [task["task_id"] for task in page["tasks"]]
            cursor = page["next_cursor"]
        return ids

    def _check_keys(self, views: Mapping[str, dict[str, Any] | None]) -> None:
        """One submit is one task, however often it was sent; and there is no task that nobody asked for."""
        tasks_of: dict[str, set[str]] = defaultdict(set)
        for task_id, key in self._ledger.accepted.items():
            tasks_of[key].add(task_id)
        for task_id, view in views.items():
            if view is not None:
                tasks_of[view["request"]["metadata"].get("key", "")].add(task_id)
        for key, tasks in tasks_of.items():
            if len(tasks) > 1:
                self._find("doubled", key, f"one key made {len(tasks)} tasks: {sorted(tasks)}")
            if key not in self._ledger.sent:
                self._find("untrue", key, f"nobody asked for {sorted(tasks)}")

    def _check_end(self, task_id: str, view: Mapping[str, Any]) -> bool:
        """Whether it ended; and whether that is the end that was seen first, has a cause, and shows what was asked."""
        status, error = view["status"], view["error"]
        if status not in FINAL:
            self._find("lost", task_id, f"still {status} after the drain")
            return False
        if (status == "failed") != (error is not None and bool(error["code"])) and status != "expired":
            self._find("untrue", task_id, f"{status}, and its error is {error}")
        if status == "canceled" and task_id not in self._ledger.canceled:
            self._find("untrue", task_id, "canceled, and nobody asked for that")
        asked = self._ledger.sent.get(view["request"]["metadata"].get("key", ""), {})
        if status == "expired" and "deadline_s" not in asked:
            self._find("untrue", task_id, "expired, and it had no deadline")
        for name, value in asked.items():
            if view["request"][name] != value:
                self._find("broken", task_id, f"{name} was {value!r}, and became {view['request'][name]!r}")
        seen = self._ledger.finals.get(task_id)
        now = [image["sha256"] for image in view["images"]]
        if seen and (seen.status != status or list(seen.shas) != now):
            self._find("doubled", task_id, f"seen {seen.status} {list(seen.shas)}, and later {status} {now}")
        return True

    def _check_attempts(self, task_id: str, view: Mapping[str, Any]) -> None:
        attempts = view["attempts"]
        outcomes = [attempt["outcome"] for attempt in attempts]
        fence = int(self._redis.hget(keys.TASK + task_id, "fence") or 0)
        if outcomes.count("succeeded") > 1:
            self._find("doubled", task_id, f"succeeded more than once: {outcomes}")
        if "succeeded" in outcomes[:-1] or (outcomes[-1:] == ["succeeded"]) != (view["status"] == "succeeded"):
            self._find("untrue", task_id, f"{view['status']} after attempts {outcomes}")
        if "running" in outcomes or any(attempt["ended_at"] is None for attempt in attempts):
            self._find("untrue", task_id, f"an attempt has no end: {outcomes}")
        if len(attempts) != fence:
            self._find("untrue", task_id, f"{len(attempts)} attempts are told, and {fence} were begun")

    # The pictures

    def _check_pictures(self, task_id: str, view: Mapping[str, Any], record: TaskRecord) -> None:
        wanted = view["request"]["n"] if view["status"] == "succeeded" else 0
        if len(view["images"]) != wanted:
            self._find("broken", task_id, f"{view['status']} with {len(view['images'])} pictures of {wanted}")
        for image, ref in zip(view["images"], record.images, strict=True):
            answer = self._http.get(self._url + image["url"], timeout=10)
            if answer.status_code == 410 and self._retired(task_id):
                continue  # its time came during the audit
            path = self._results / ref.key
            stored = path.read_bytes() if path.is_file() else b""
            what = picture_fault(image, view["request"], stored)
            if what is None and (answer.status_code != 200 or answer.content != stored):
                what = f"is served as {answer.status_code} with {len(answer.content)} bytes"
            if what:
                self._find("broken", task_id, f"{image['url']} {what}")

    # What no client sees

    def _settle(self, settle_s: float, records: Mapping[str, TaskRecord | None]) -> None:
        named = {image.key for record in records.values() if record for image in record.images}
        until = time.monotonic() + settle_s
        while (left := self._leftovers(named)) and time.monotonic() < until:
            time.sleep(0.2)
        self._findings += left

    def _leftovers(self, named: set[str]) -> list[Finding]:
        left = [Finding("leftover", key, f"a lease that nobody holds: {key}") for key in self._zset(keys.LEASES)]
        left += [Finding("leftover", key, "stands among the open tasks") for key in self._zset(keys.OPEN)]
        for prefix, read in ((keys.RQ_STARTED, self._zset), (keys.RQ_QUEUE, self._list)):
            for key in self._redis.scan_iter(match=prefix + "*", count=1000):
                left += [Finding("leftover", f"{key} {entry}", "was never taken out") for entry in read(key)]
        horizon = time.time() - self._retention_s  # what is older waits for its sweep
        for path in (path for path in self._results.rglob("*") if path.is_file() and path.stat().st_mtime > horizon):
            name = str(path.relative_to(self._results))
            if name.endswith(PARTIAL):
                left.append(Finding("leftover", name, "half a file"))
            elif name not in named:
                left.append(Finding("doubled", name, "a result that no record names"))
        return left

    def _zset(self, key: str) -> list[str]:
        return [str(entry) for entry in self._redis.zrange(key, 0, -1)]

    def _list(self, key: str) -> list[str]:
        return [str(entry) for entry in self._redis.lrange(key, 0, -1)]

    def _report(self, views: Mapping[str, dict[str, Any] | None]) -> Report:
        accepted = [views[task_id] for task_id in self._ledger.accepted]
        ends = Counter(view["status"] for view in accepted if view)
        gone = [task_id for task_id in self._ledger.accepted if views[task_id] is None and self._retired(task_id)]
        ends.update(self._ledger.finals[task_id].status for task_id in gone)
        wrong = Counter(kind for kind, _ in {(finding.kind, finding.subject) for finding in self._findings})
        return Report(
            accepted=len(accepted), succeeded=ends["succeeded"], failed=ends["failed"], canceled=ends["canceled"],
            expired=ends["expired"], lost=wrong["lost"], doubled=wrong["doubled"], broken=wrong["broken"],
            leftovers=wrong["leftover"], untrue=wrong["untrue"], refused=wrong["refused"],
            outcomes=Counter(attempt["outcome"] for view in accepted if view for attempt in view["attempts"]),
            problems=[f"{finding.kind}: {finding.subject}: {finding.what}" for finding in self._findings],
        )  # fmt: skip


def picture_fault(image: Mapping[str, Any], request: Mapping[str, Any], data: bytes) -> str | None:
    """Return what is wrong with a picture's file, or None: size, SHA-256, decoding, and what its seed should give."""
    if len(data) != image["bytes"]:
        return f"has {len(data)} bytes instead of {image['bytes']}"
    if hashlib.sha256(data).hexdigest() != image["sha256"]:
        return "has another SHA-256 than its record"
    try:
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    if pixels.shape != (request["height"], request["width"], 3):
        return f"has the shape {pixels.shape}"
    exact = request["model"] == "simulated" and request["format"] == "png"
    if exact and not np.array_equal(pixels, gradient(request, image["seed"])):
        return "does not show what its seed gives"
    return None


def gradient(request: Mapping[str, Any], seed: int) -> NDArray[np.uint8]:
    """Return the picture that the simulated model draws for a request, as (height, width, 3)."""
    pipeline = Pipeline(load_catalogue()["simulated"], device="cpu")
    names = ("prompt", "width", "height", "steps", "guidance_scale")
    wanted = ImageRequest(seed=seed, **{name: request[name] for name in names})
    return pipeline.finish(pipeline.start(wanted))
