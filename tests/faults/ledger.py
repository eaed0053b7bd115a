"""What the clients were told, kept outside the fleet: the one witness that no fault of the fleet can reach."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Final:
    """The first final state that a client saw of a task, and the SHA-256 of each picture as it came over HTTP."""

    status: str
    error_code: str | None
    shas: tuple[str, ...]
    total_ms: float | None
    at: float  # seconds since 1970


class Ledger:
    """An append-only file of JSON lines. A line is on the disk before anybody acts on it; safe between threads.

    Opened again, it goes on where it stopped; a last line that was torn is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sent: dict[str, Mapping[str, Any]] = {}  # request key -> the body that was asked for
        self.accepted: dict[str, str] = {}  # task id -> the key whose submit got a 202 with it
        self.accepted_at: dict[str, float] = {}
        self.canceled: set[str] = set()  # task ids of which a cancel was asked, whatever came of it
        self.refused: dict[str, str] = {}  # key -> an answer that no fault explains
        self.finals: dict[str, Final] = {}
        self.unanswered = 0  # tries that ended without an acknowledgement
        self._lock = threading.Lock()
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    self._book(json.loads(line))
        self._file = path.open("ab")

    def close(self) -> None:
        self._file.close()

    def write(self, event: str, **fields: object) -> None:
        """Append one of: sent (key, body), unanswered (key, why), accepted (key, task), cancel (task),
        refused (key, why), final (task, status, error_code, shas, total_ms)."""
        entry = {"event": event, "at": time.time(), **fields}
        with self._lock:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._book(entry)

    def _book(self, entry: Mapping[str, Any]) -> None:
        match entry["event"]:
            case "sent":
                self.sent[entry["key"]] = entry["body"]
            case "unanswered":
                self.unanswered += 1
            case "accepted":
                self.accepted.setdefault(entry["task"], entry["key"])
                self.accepted_at.setdefault(entry["task"], entry["at"])
            case "cancel":
                self.canceled.add(entry["task"])
            case "refused":
                self.refused[entry["key"]] = entry["why"]
            case "final":
                names = ("status", "error_code", "total_ms", "at")
                final = Final(shas=tuple(entry["shas"]), **{name: entry[name] for name in names})
                self.finals.setdefault(entry["task"], final)
