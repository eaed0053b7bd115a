"""What lies in storage too long goes by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

from common.settings import Settings
from common.storage import open_storage
from tests.servers import eventually
from worker.housekeeping import Housekeeping


def old_picture(settings: Settings, key: str) -> Path:
    storage = open_storage(settings)
    storage.put(key, b"x")
    path = storage.path(key)
    assert path is not None
    long_ago = time.time() - settings.retention_days * 86_400 - 60
    os.utime(path, (long_ago, long_ago))
    return path


def test_it_sweeps_at_its_start_and_at_every_interval(settings: Settings) -> None:
    settings = settings.model_copy(update={"housekeeping_s": 0.05})
    open_storage(settings).put("new/0.png", b"x")
    first = old_picture(settings, "old/0.png")
    housekeeping = Housekeeping(settings)
    housekeeping.start()
    try:
        eventually(lambda: not first.exists())
        second = old_picture(settings, "old/1.png")
        eventually(lambda: not second.exists())
    finally:
        housekeeping.stop()
    assert open_storage(settings).read("new/0.png") == b"x"


def test_half_an_hour_is_the_default(settings: Settings) -> None:
    assert (settings.housekeeping_s, settings.retention_days) == (1800, 7)
