from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from gateway.aside import Threads

UNDER_GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, time
from common.errors import TooBusy
from gateway.aside import Threads, within
native_sleep = monkey.get_original("time", "sleep")

def count(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return seconds

ticks = []
def tick():
    while True:
        ticks.append(time.perf_counter())
        gevent.sleep(0.01)

def fail():
    raise ValueError("as it was")

ticker = gevent.spawn(tick)
threads = Threads(2)
jobs = [gevent.spawn(threads.run, count, 0.6) for _ in range(3)]
gevent.joinall(jobs)
assert [job.value for job in jobs] == [0.6] * 3
gaps = [later - earlier for earlier, later in zip(ticks, ticks[1:])]
assert max(gaps) < 0.5, max(gaps)

def told(call, *args):
    try:
        return call(*args)
    except TooBusy as error:
        return error.code

hasty = Threads(2, patience_s=0.9)
began = time.perf_counter()
crowd = [gevent.spawn(told, hasty.run, time.sleep, 0.6) for _ in range(100)]
gevent.joinall(crowd)
assert [one.value for one in crowd].count("too_busy") == 96, [one.value for one in crowd]
assert time.perf_counter() - began < 4
assert hasty.run(count, 0.01) == 0.01

def come_and_go(number):
    gevent.sleep(number % 7 / 1000)
    return busy.run(divmod, number, 2)

busy = Threads(2)
jobs = [gevent.spawn(come_and_go, number) for number in range(1000)]
gevent.joinall(jobs, timeout=30)
assert [job.value for job in jobs] == [divmod(number, 2) for number in range(1000)], "turns are lost"

def late(call, *args):
    began = time.perf_counter()
    try:
        return call(*args)
    except TimeoutError:
        return "late" if time.perf_counter() - began < 5 else "too late"

lost = Threads(1)
assert late(lost.run_within, 0.2, native_sleep, 6) == "late"
assert late(lost.run_within, 0.2, divmod, 7, 2) == "late", "its only thread is lost"
assert late(Threads(1).run_within, 5, divmod, 7, 2) == (3, 1)
assert late(within, 0.2, gevent.sleep, 6) == "late"
assert late(within, 5, divmod, 7, 2) == (3, 1)

try:
    threads.run(fail)
except ValueError as error:
    print(error)
"""


def test_where_threads_are_threads_it_is_simply_done() -> None:
    threads = Threads(1)
    assert threads.run(threading.current_thread) is threading.current_thread()
    assert threads.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.run(divmod, 1, 0)


def test_under_gevent_others_go_on_and_an_error_comes_back_without_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", UNDER_GEVENT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("as it was\n", "")
