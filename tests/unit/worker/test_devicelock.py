"""A GPU belongs to one supervisor's worker, also after that supervisor is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker import devicelock


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_whoever_inherits_the_lock_holds_it_too() -> None:
    lock = devicelock.acquire("0.0")
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[lock], stdin=subprocess.PIPE)
    os.close(lock)  # as when the supervisor dies
    assert devicelock.acquire("0.0") is None
    child.communicate(b"\n")
    again = devicelock.acquire("0.0")
    assert again is not None
    os.close(again)


def test_every_gpu_has_a_lock_of_its_own() -> None:
    locks = [devicelock.acquire(f"{index}.0") for index in range(2)]
    assert all(lock is not None for lock in locks)
    for lock in locks:
        os.close(lock or 0)
