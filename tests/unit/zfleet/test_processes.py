from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.servers import eventually
from zfleet.interrupts import Interrupts
from zfleet.processes import Child, Guardian

ROOT = Path(__file__).parents[3]
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"
PARENT_OF_A_SLEEPER = (
    "import subprocess, sys, time; "
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); time.sleep(600)"
)


def child(tmp_path: Path, program: str, name: str = "child", rank: int = 0, grace_s: float = 0.5) -> Child:
    return Child(
        name, [sys.executable, "-c", program], env=os.environ, cwd=tmp_path, output=tmp_path / f"{name}.out",
        rank=rank, grace_s=grace_s,
    )  # fmt: skip


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Child]]:
    children: list[Child] = []
    yield children
    for each in children:
        each.stop(hurry=lambda: True)


def says(child: Child) -> list[str]:
    eventually(lambda: child.tail(1))
    return child.tail(1)


def test_a_child_starts_stops_and_starts_again(tmp_path: Path) -> None:
    one = child(tmp_path, SLEEPER)
    assert (one.running, one.pid, one.exit_code) == (False, 0, None)
    one.stop()
    for _ in range(2):
        one.start()
        assert one.running
        one.stop()
        assert (one.running, one.exit_code) == (False, -signal.SIGTERM)


def test_output_is_kept_over_a_restart(tmp_path: Path) -> None:
    one = child(tmp_path, "print('a'); print('b')")
    for expected in (2, 4):
        one.start()
        eventually(lambda: not one.running)
        assert len(one.tail(10)) == expected
    assert one.tail(1) == ["b"]


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    one = child(tmp_path, STUBBORN, grace_s=0.4)
    one.start()
    says(one)
    began = time.monotonic()
    one.stop()
    assert 0.4 <= time.monotonic() - began < 3
    assert one.exit_code == -signal.SIGKILL


def test_hurry_cuts_the_grace_short(tmp_path: Path) -> None:
    one = child(tmp_path, STUBBORN, grace_s=60)
    one.start()
    says(one)
    one.stop(hurry=lambda: True)
    assert not one.running


def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    one = child(tmp_path, PARENT_OF_A_SLEEPER)
    one.start()
    grandchild = psutil.Process(int(says(one)[0]))
    one.stop()
    eventually(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


def test_a_child_is_in_a_group_of_its_own(tmp_path: Path, started: list[Child]) -> None:
    one = child(tmp_path, SLEEPER)
    started.append(one)
    one.start()
    assert os.getpgid(one.pid) == one.pid


def test_the_guardian_leaves_alone_what_it_was_told_to_forget(tmp_path: Path, started: list[Child]) -> None:
    guardian = Guardian()
    one, two = child(tmp_path, SLEEPER, "one"), child(tmp_path, SLEEPER, "two")
    started += [one, two]
    for each in started:
        each.start()
        guardian.watch(each)
    guardian.forget(one.pid)
    guardian.close()
    assert (one.running, two.running) == (True, False)


def test_the_guardian_goes_by_rank_and_kills_the_stubborn(tmp_path: Path, started: list[Child]) -> None:
    note = "open('order', 'a').write(NAME); raise SystemExit"
    program = f"import signal; signal.signal(signal.SIGTERM, lambda *_: exec({note!r})); {SLEEPER}"
    guardian = Guardian()
    for name, rank in (("A", 1), ("B", 2), ("C", 0)):
        each = child(tmp_path, f"NAME = {name!r}; {program}", name, rank)
        started.append(each)
    started.append(child(tmp_path, STUBBORN, "D", 3, grace_s=0.2))
    for each in started:
        each.start()
        guardian.watch(each)
        says(each)
    guardian.close()
    assert (tmp_path / "order").read_text() == "BAC"
    eventually(lambda: not any(each.running for each in started))


def test_a_killed_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    program = f"""
import os, sys, time
from pathlib import Path
from zfleet.processes import Child, Guardian
guardian = Guardian()
child = Child("c", [sys.executable, "-c", {SLEEPER!r}], env=os.environ, cwd=Path({str(tmp_path)!r}),
              output=Path({str(tmp_path)!r}) / "out", rank=0, grace_s=5)
child.start()
guardian.watch(child)
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    family = psutil.Process(parent.pid).children(recursive=True)
    assert orphan in family and len(family) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_the_first_signal_interrupts_and_the_second_is_a_hurry() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert not interrupts.hurry
        signal.raise_signal(signal.SIGINT)
        assert interrupts.hurry
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_held_signal_comes_after_the_block() -> None:
    order: list[str] = []

    def hold(interrupts: Interrupts) -> None:
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGTERM)
            order.append("the block")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        hold(interrupts)
    assert order == ["the block"]


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
