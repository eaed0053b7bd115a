"""How long an idle fleet takes to begin, and a finished task to be told to the client that waits for it."""

from __future__ import annotations

import random
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from bench.caller import Caller

SETTLE_S = 0.03  # for the worker to be back at the bell; some of it random, so that no timer is hit in step
FIRST_STEP_S = 5.0


class Latencies(NamedTuple):
    """Milliseconds, one entry for each task."""

    pick_up: list[float]  # from just before the submit is sent to the beginning of its first step
    claimed: list[float]  # of that, from the submit's moment in Redis to the claim's; whole milliseconds
    answered: list[float]  # from the finish's moment in Redis to the answer's arrival; up to 1 ms too long


def one_by_one(clock: Path, port: int, tasks: int) -> Latencies:
    """Submit a task to an idle worker that writes `clock`, wait for it by one status call, and so on."""
    found = Latencies([], [], [])
    caller = Caller(port)
    try:
        caller.finished(caller.submit(seed=0))
        first = random.getrandbits(50)  # seeds tell the pictures apart, in earlier and later runs as well
        for seed in range(first, first + tasks):
            time.sleep(SETTLE_S + random.random() * SETTLE_S)
            began = time.monotonic()
            status = caller.finished(caller.submit(seed=seed))
            answered = time.time()
            found.pick_up.append((_first_step(clock, seed) - began) * 1000)
            found.claimed.append(_ms(status["started_at"]) - _ms(status["created_at"]))
            found.answered.append(answered * 1000 - _ms(status["finished_at"]))
    finally:
        caller.close()
    return found


def _ms(timestamp: str) -> float:
    """Return an RFC 3339 time as milliseconds since 1970; Redis gives whole ones."""
    return datetime.fromisoformat(timestamp).timestamp() * 1000


def _first_step(clock: Path, seed: int) -> float:
    """Return when this picture's first step began, on time.monotonic's clock, which all processes share."""
    until = time.monotonic() + FIRST_STEP_S
    while time.monotonic() < until:
        for line in reversed(clock.read_text("utf-8").splitlines()):
            number, _, moment = line.partition(" ")
            if number == str(seed) and moment:
                return float(moment)
        time.sleep(0.01)
    raise TimeoutError(f"the worker never began the picture with seed {seed}")
