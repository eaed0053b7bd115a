"""What one process tells of itself and another reads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

from tests.servers import eventually
from worker.heartbeat import Heartbeat, InHand, Stage, shared_file

WRITER = """
import os, signal, sys
from worker.heartbeat import Heartbeat, InHand
heartbeat = Heartbeat(int(sys.argv[1]))
heartbeat.holds_memory(1234)
heartbeat.busy([InHand("a" * 64, 3, 5.5, "deadline"), InHand("b", 1, float("inf"), "run_limit")])
os.kill(os.getpid(), signal.SIGKILL)
"""

RESTLESS = """
import sys
from worker.heartbeat import Heartbeat, InHand, Stage
heartbeat = Heartbeat(int(sys.argv[1]))
entry = InHand("a", 1, float("inf"), "run_limit")
while True:
    heartbeat.busy([entry])
    heartbeat.at(Stage.IDLE)
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
    assert reading.on_device == [InHand("a" * 64, 3, 5.5, "deadline"), InHand("b", 1, math.inf, "run_limit")]
    reader.close()


def test_nothing_is_on_the_device_between_two_calls() -> None:
    heartbeat = Heartbeat()
    entry = InHand("a", 1, math.inf, "run_limit")
    heartbeat.busy([entry])
    assert heartbeat.read().on_device == [entry]
    heartbeat.at(Stage.IDLE)
    assert (heartbeat.read().on_device, heartbeat.standing_s()) == ((), 0.0)
    heartbeat.busy([entry])
    time.sleep(0.01)
    assert heartbeat.read().on_device == [entry]
    assert 0.01 <= heartbeat.standing_s() < 5


def test_a_load_is_for_somebody_and_is_no_call_that_hangs() -> None:
    heartbeat = Heartbeat()
    entry = InHand("a", 1, math.inf, "run_limit")
    heartbeat.loading([entry])
    time.sleep(0.01)
    reading = heartbeat.read()
    assert (reading.stage, reading.on_device, heartbeat.standing_s()) == (Stage.LOADING, [entry], 0.0)
    heartbeat.loading()
    heartbeat.has_models(["a"], 3)
    assert (heartbeat.read().on_device, heartbeat.read().models_changed) == ([], 3)


def test_the_same_models_are_told_by_the_same_number() -> None:
    heartbeat = Heartbeat()
    told = []
    for changed, names in enumerate((["a"], ["a", "b"], ["b", "a"], ["ab"], [], ["a"])):
        heartbeat.has_models(names, changed)
        told.append(heartbeat.read().models)
    assert told[0] == told[5]
    assert told[1] == told[2]
    assert len(set(told)) == 4


def test_a_reader_never_sees_half_a_number() -> None:
    """Not a thread: in one process the interpreter's lock would keep the two apart."""
    shared = shared_file()
    reader = Heartbeat(shared)
    reader.at(Stage.STARTING)
    writer = subprocess.Popen([sys.executable, "-c", RESTLESS, str(shared)], pass_fds=[shared])
    os.close(shared)
    try:
        eventually(lambda: reader.read().stage is Stage.BUSY)
        assert max(reader.standing_s() for _ in range(200_000)) < 5, "a call seemed to have begun long ago"
    finally:
        writer.kill()
        writer.wait()
        reader.close()


def test_what_is_being_stored_is_told_apart_from_what_is_on_the_device() -> None:
    heartbeat = Heartbeat()
    stored, run = (InHand(name, 1, math.inf, "run_limit") for name in ("stored", "run"))
    heartbeat.storing([stored])
    heartbeat.busy([run])
    assert (heartbeat.read().on_device, heartbeat.read().in_store) == ([run], [stored])
    heartbeat.at(Stage.IDLE)
    assert (heartbeat.read().on_device, heartbeat.read().in_store) == ((), [stored])
    heartbeat.storing([])
    assert heartbeat.read().in_store == []


def test_more_tasks_than_there_is_room_for_are_not_told() -> None:
    heartbeat = Heartbeat()
    heartbeat.busy([InHand(str(index), 1, math.inf, "run_limit") for index in range(300)])
    assert len(heartbeat.read().on_device) == 256
