"""What the workers of a local stack complain about, read from their JSON logs."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

LOGS = "[sw]*-*.log"  # <role>-<slot>.log of the supervisor and the workers, as telemetry names them
OUT_OF_MEMORY = -9  # the exit code of a child that the kernel killed


class Trouble:
    """Looks at what was logged since it was made."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._read = {path: path.stat().st_size for path in log_dir.glob(LOGS)}
        self._lines: deque[str] = deque(maxlen=100)
        self._failed = ""

    def message(self) -> str | None:
        """Return why a worker has died since, in its own words where it had any; None while all is well."""
        for event in self._news():
            if event.get("event") == "worker_failed":
                self._failed = str(event.get("message", ""))
            elif event.get("event") == "worker_died":
                code = event.get("exit_code")
                hint = " (out of memory?)" if code == OUT_OF_MEMORY else ""
                return self._failed or f"it ended with exit code {code}{hint}"
        return None

    def tail(self, lines: int) -> list[str]:
        """Return the last lines seen."""
        return list(self._lines)[-lines:]

    def _news(self) -> list[dict[str, Any]]:
        # The supervisor writes "died" after the worker wrote "failed"; by name, its file would be read before
        events = []
        for path in self._log_dir.glob(LOGS):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._read[path] = self._read.get(path, 0) + len(line)
                    text = line.decode("utf-8", "replace").rstrip()
                    self._lines.append(text)
                    events.append(_parsed(text))
        return sorted(events, key=lambda event: str(event.get("time", "")))


def _parsed(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
