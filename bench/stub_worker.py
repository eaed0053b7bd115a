"""A worker that makes no pictures: it claims what there is and finishes it a set time later. `-m bench.stub_worker`.

So that the gateway is busy while next to nothing else is: a machine of two cores cannot feed it otherwise.
"""

from __future__ import annotations

import os
import time
from collections import deque
from datetime import UTC, datetime

from common.broker import Broker
from common.cards import WorkerCard
from common.records import Hold
from common.schemas import ImageRef, StageTimings
from common.settings import load_settings

ROOM = 64
HOLD_S = 0.05  # longer than a client takes to come back and wait
BEAT_S = 3.0
TTL_S = 60
NAP_S = 0.001
MODELS = ("simulated",)


def main() -> None:
    """Work until killed."""
    broker = Broker(load_settings())
    name = f"stub.{os.getpid()}"
    began = datetime.now(UTC)
    image = ImageRef(key="stub/0.png", width=16, height=16, format="png", bytes=1, sha256="0" * 64, seed=1)
    held: deque[tuple[float, Hold]] = deque()
    next_beat = 0.0
    while True:
        if time.monotonic() >= next_beat:
            next_beat = time.monotonic() + BEAT_S
            card = WorkerCard(
                name=name, host="bench", pid=os.getpid(), state="busy", device="cpu", models=MODELS,
                models_loaded=MODELS, capacity=ROOM, running=(), images_done=0, rss_mb=0, started_at=began,
                seen_at=datetime.now(UTC),
            )  # fmt: skip
            broker.beat(card, [hold for _, hold in held], TTL_S)
        if len(held) < ROOM:
            claimed = broker.claim(name, "cpu", MODELS, ROOM - len(held)).tasks
            held.extend((time.monotonic() + HOLD_S, Hold(task.task_id, task.fence)) for task in claimed)
            if not held:
                broker.wait(MODELS)
        while held and held[0][0] <= time.monotonic():
            hold = held.popleft()[1]
            broker.finish(name, hold, "succeeded", images=[image], stages=StageTimings(), busy_ms=HOLD_S * 1000)
        time.sleep(NAP_S)


if __name__ == "__main__":
    main()
