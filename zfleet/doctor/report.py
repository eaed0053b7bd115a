"""What a check finds, and how all of them are carried out: side by side, each within a time of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import FleetError
from common.settings import Settings

State = Literal["ok", "warning", "problem", "skipped"]
LIMIT_S = 40.0  # for one topic; each bounds its own questions more tightly


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is looked at."""

    settings: Settings
    nginx_config: Path | None = None
    checksums: bool = False  # of all files, however long it takes


@dataclass(frozen=True)
class Finding:
    """One line. `skipped` is what could not be looked at here; it says why."""

    check: str
    state: State
    says: str
    remedy: str = ""


Check = Callable[[Patient], Iterable[Finding]]


def examine(patient: Patient, checks: Mapping[str, Check], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Carry out these checks at once, and yield what they find in their order.

    One that is not done in time or breaks is a problem itself; with `checksums` all wait for as long as it takes.
    """
    found: dict[str, list[Finding]] = {}

    def carry_out(name: str, check: Check) -> None:
        try:
            found[name] = list(check(patient))
        except FleetError as error:
            found[name] = [Finding(name, "problem", error.message)]
        except Exception as error:  # the other checks are worth hearing all the same
            found[name] = [Finding(name, "problem", f"the check itself failed: {type(error).__name__}: {error}")]

    pairs = {name: (name, check) for name, check in checks.items()}
    threads = {name: threading.Thread(target=carry_out, args=pair, daemon=True) for name, pair in pairs.items()}
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(None if patient.checksums else limit_s)
        late = Finding(name, "problem", f"there was no answer within {limit_s:g} s", "see what holds it up")
        yield from found.get(name, [late])
