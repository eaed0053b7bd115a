"""What of a worker's processor time goes into the picture itself: its steps, drawing it, encoding and storing it."""

from __future__ import annotations

import hashlib
import time

from common import storage
from common.settings import Settings
from worker.encoding import encode
from worker.pipelines.base import ImageRequest
from worker.pipelines.simulated import Pipeline

SIDE = 16  # pixels, as in caller.body
STEPS = 8


def cost_ms(settings: Settings, pictures: int) -> float:
    """Return the processor milliseconds to make, encode (PNG), hash and store one tiny picture with a worker's code.

    At a worker's pace, one every `simulated_image_ms`: a processor that has been elsewhere meanwhile takes longer for
    the same work than in a tight loop.
    """
    pipeline = Pipeline(settings.catalogue()["simulated"], device="cpu")
    store = storage.open_storage(settings)
    request = ImageRequest(prompt="", width=SIDE, height=SIDE, steps=STEPS, guidance_scale=0.0, seed=1)

    def one(index: int) -> None:
        run = pipeline.start(request)
        while not run.done:
            pipeline.step([run])
        data = encode(pipeline.finish(run), "png", 85)
        store.put(f"bench/{index}/0.png", data)
        hashlib.sha256(data).hexdigest()

    one(0)
    began = time.process_time()
    for index in range(1, pictures + 1):
        one(index)
    return (time.process_time() - began) / pictures * 1000


def calibration_ms() -> float:
    """Return the processor milliseconds that a fixed piece of Python takes: how fast this machine is just now."""
    began = time.process_time()
    total = 0
    for number in range(1_000_000):
        total += number & 7
    return (time.process_time() - began) * 1000
