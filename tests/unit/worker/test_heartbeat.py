"""What one process tells of itself and another reads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

from worker.heartbeat import Heartbeat, OnDevice, Stage, shared_file

WRITER = """
import os, signal, sys
from worker.heartbeat import Heartbeat, OnDevice
heartbeat = Heartbeat(int(sys.argv[1]))
heartbeat.holds_memory(1234)
heartbeat.busy([OnDevice("a" * 64, 3, 5.5, "deadline"), OnDevice("b", 1, float("inf"), "run_limit")])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_on_its_device_can_still_be_read() -> None:
    shared = shared_file()
    reader = Heartbeat(shared)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", WRITER, str(shared)], pass_fds=[shared], check=False)
    os.close(shared)
    reading = reader.read()
    assert reading.stage is Stage.BUSY
    assert began <= reading.since <= time.monotonic()
    assert reading.device_mb == 1234
    assert reading.on_device == [OnDevice("a" * 64, 3, 5.5, "deadline"), OnDevice("b", 1, math.inf, "run_limit")]
    reader.close()


def test_nothing_is_on_the_device_between_two_calls() -> None:
    heartbeat = Heartbeat()
    entry = OnDevice("a", 1, math.inf, "run_limit")
    heartbeat.busy([entry])
    assert heartbeat.read().on_device == [entry]
    heartbeat.at(Stage.IDLE)
    assert (heartbeat.read().on_device, heartbeat.standing_s()) == ((), 0.0)
    heartbeat.busy([entry])
    time.sleep(0.01)
    assert heartbeat.read().on_device == [entry]
    assert 0.01 <= heartbeat.standing_s() < 5


def test_more_tasks_than_there_is_room_for_are_not_told() -> None:
    heartbeat = Heartbeat()
    heartbeat.busy([OnDevice(str(index), 1, math.inf, "run_limit") for index in range(300)])
    assert len(heartbeat.read().on_device) == 256
