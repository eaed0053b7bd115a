"""The gateway fuzzed by schemathesis from its own /openapi.json: every operation of every dialect, as two tenants and
an operator, over a real gunicorn and Redis.

    python -m tests.fuzz.run --cases 5000 --seed 1

The same seed draws the same requests, but for ids that answers bring. Exits with 0 if every answer was as described.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.table import machine
from tests.fuzz.target import Target
from tests.servers import eventually

ROOT = Path(__file__).parents[2]
PHASES = 3  # that draw: each sends its own examples of an operation
ROUNDS = 10  # at most, until there were as many cases as were asked for
REFUSED = (401, 403)  # whatever else is sent: schemathesis' own warning of it counts in shares, which few cases miss
CALM_S = 20.0  # so soon after the last request every task has ended
CONFIGURATION = """\
hooks = "tests.fuzz.hooks"
continue-on-failure = true
request-timeout = 30.0

[cache]  # what an earlier run has seen would be sent again, whatever the seed
enabled = false

[auth.wfc]
path = "{identities}"
peers = ["acme", "umbrella"]

[checks.positive_data_acceptance]  # the description cannot say all that is refused, such as a model's limits
enabled = false

[checks.not_a_server_error]  # hooks.py has one that can tell faults from what was asked for
enabled = false

[warnings]
fail-on = ["missing_deserializer", "unused_openapi_auth", "unsupported_regex", "method_not_allowed"]
"""


@dataclass
class Outcome:
    """What came of it. `problems` is empty when every answer was as described and nothing broke."""

    operations: int = 0
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        statuses = ", ".join(f"{count:,} × {status}" for status, count in sorted(self.statuses.items()))
        verdict = "; ".join(self.problems) or "every answer was as described"
        return f"{self.cases:,} cases of {self.operations} operations: {verdict} ({statuses})"


def fuzz(folder: Path, *, cases: int, seed: int) -> Outcome:
    """Send at least so many cases to a fleet of its own, which keeps everything in `folder`; prints how it goes."""
    outcome = Outcome()
    with Target(folder) as target:
        configuration = _configure(folder, target)
        operations = _operations(target)
        served_by = target.gateway_processes()
        for number in range(ROUNDS):
            if outcome.cases >= cases or outcome.problems:
                break
            _round(target, configuration, folder / f"report {number}.json", seed + number, cases, outcome)
        if not target.healthy or target.gateway_processes() != served_by:
            outcome.problems.append("a process died")
        eventually(lambda: target.broker.pending() == 0, within_s=CALM_S)
    log = (folder / "gateway.log").read_text("utf-8", "replace")
    answered = [json.loads(line) for line in log.splitlines() if line.startswith("{") and '"event":"request"' in line]
    outcome.statuses.update(line["status"] for line in answered)
    if outcome.cases >= cases:
        let_in = {(line["method"], line["route"]) for line in answered if line["status"] not in REFUSED}
        outcome.problems += [f"nobody was let in: {' '.join(call)}" for call in sorted(operations - let_in)]
    outcome.problems += sorted({f"in the log: {line}" for line in re.findall(r"request_failed|Traceback", log)})
    if outcome.cases < cases and not outcome.problems:
        outcome.problems.append(f"only {outcome.cases} cases")
    return outcome


def _configure(folder: Path, target: Target) -> Path:
    """Write schemathesis' configuration, with the keys in a file rather than on a command line; return its path."""
    identities = [
        {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
        for name, key in target.keys.items()
    ]
    (folder / "identities.json").write_text(json.dumps({"auth": identities}))
    path = folder / "schemathesis.toml"
    path.write_text(CONFIGURATION.format(identities=folder / "identities.json"))
    return path


def _round(target: Target, configuration: Path, report: Path, seed: int, cases: int, outcome: Outcome) -> None:
    each = max(1, cases // (PHASES * len(_operations(target))))
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run",
            f"{target.url}/openapi.json", "--seed", str(seed), "--max-examples", str(each),
            "--report", "json", "--report-json-path", str(report),
        ],
        cwd=ROOT, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    if not found.get("complete"):
        outcome.problems.append(f"schemathesis ended with {done.returncode} and without a whole report")
        return
    outcome.operations = found["operations"]["tested"]
    outcome.cases += found["test_cases"]["generated"]
    for failure in found["failures"]:
        outcome.problems.append(f"{failure['title']}: {', '.join(failure['operations'])}")
    for error in found["errors"]:
        outcome.problems.append(f"schemathesis could not go on: {error}")
    if done.returncode and not outcome.problems:
        outcome.problems.append(f"schemathesis ended with {done.returncode}")


def _operations(target: Target) -> set[tuple[str, str]]:
    """Return the method and the route of each, as the gateway's log has them."""
    return {
        (method.upper(), re.sub(r"{(\w+)}", r"<\1>", path))
        for path, calls in target.description()["paths"].items()
        for method in calls
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="at least so many requests (5000)")
    parser.add_argument("--seed", type=int, default=1, help="what they are drawn from (1)")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(Path(folder), cases=given.cases, seed=given.seed)
    print(f"\n{outcome}\nSeed {given.seed}, {time.monotonic() - began:.0f} s on {machine()}")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
