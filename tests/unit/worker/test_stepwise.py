"""A call in a thread of its own that never runs while its caller does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import worker
from worker.stepwise import Stepwise, Stopped

ROOT = Path(worker.__path__[0]).parent


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "stepwise"] == []


def counting(log: list[int], steps: int) -> Stepwise[str]:
    def count(pause: Callable[[], None]) -> str:
        for step in range(steps):
            log.append(step)
            pause()
        return "done"

    return Stepwise(count)


def test_each_advance_is_one_step_and_the_last_is_the_end() -> None:
    log: list[int] = []
    call = counting(log, 2)
    assert log == []
    assert [call.advance() for _ in range(2)] == [False, False]
    assert log == [0, 1]
    assert call.advance() is True
    assert call.advance() is True  # and stays so
    assert call.complete() == "done"


def test_completing_goes_through_every_pause() -> None:
    log: list[int] = []
    call = counting(log, 5)
    call.advance()
    assert call.complete() == "done"
    assert log == [0, 1, 2, 3, 4]
    assert counting(log, 0).complete() == "done"


def test_only_one_of_caller_and_calls_ever_runs() -> None:
    running: list[str] = []

    def work(name: str) -> Callable[[Callable[[], None]], None]:
        def busy(pause: Callable[[], None]) -> None:
            for _ in range(50):
                running.append(name)
                time.sleep(0.0002)
                assert running == [name]
                running.remove(name)
                pause()

        return busy

    calls = [Stepwise(work(name)) for name in "abc"]
    for _ in range(50):
        for call in calls:
            call.advance()
            assert running == []
    assert all(call.advance() for call in calls)


def test_what_a_call_raises_reaches_its_caller_and_again() -> None:
    def fail(pause: Callable[[], None]) -> None:
        pause()
        raise KeyError("the reason")

    call = Stepwise(fail)
    assert call.advance() is False
    for _ in range(2):
        with pytest.raises(KeyError, match="the reason"):
            call.advance()
    with pytest.raises(KeyError):
        call.complete()
    call.stop()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_call_is_stopped_where_it_stands(steps: int) -> None:
    log: list[int] = []
    left: list[str] = []

    def count(pause: Callable[[], None]) -> None:
        try:
            for step in range(3):
                log.append(step)
                try:
                    pause()
                except Exception:  # which being stopped is not
                    log.append(-1)
        finally:
            left.append("left")

    call = Stepwise(count)
    for _ in range(steps):
        call.advance()
    call.stop()
    call.stop()
    assert log == list(range(steps))
    assert left == (["left"] if steps else [])


def test_a_call_that_will_not_be_stopped_is_stopped_at_each_pause() -> None:
    stopped: list[int] = []

    def stubborn(pause: Callable[[], None]) -> None:
        for step in range(4):
            try:
                pause()
            except Stopped:
                stopped.append(step)

    call = Stepwise(stubborn)
    call.advance()
    call.stop()
    assert stopped == [0, 1, 2, 3]


def test_a_process_ends_with_calls_that_stand_still() -> None:
    program = (
        "from worker.stepwise import Stepwise\n"
        "import time\n"
        "calls = [Stepwise(lambda pause: [pause() for _ in range(9)]) for _ in range(3)]\n"
        "print([call.advance() for call in calls])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[False, False, False]\n", "")


def test_an_exception_from_a_signal_ends_the_call_at_its_next_pause() -> None:
    class Enough(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Enough

    log: list[int] = []

    def slow(pause: Callable[[], None]) -> None:
        for step in range(3):
            log.append(step)
            time.sleep(0.2)
            pause()

    call = Stepwise(slow)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Enough):
            call.advance()
    finally:
        signal.signal(signal.SIGALRM, before)
    call.stop()
    assert log == [0]
