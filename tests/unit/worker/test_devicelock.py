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
    monkeypatch.setattr(devicelock, "SHARED", tmp_path)


def test_whoever_inherits_the_lock_holds_it_too() -> None:
    lock = devicelock.acquire("0.0")
    child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[lock], stdin=subprocess.PIPE)
    os.close(lock)  # as when the supervisor dies
    with pytest.raises(BlockingIOError):
        devicelock.acquire("0.0")
    child.communicate(b"\n")
    os.close(devicelock.acquire("0.0"))


def test_every_gpu_has_a_lock_of_its_own() -> None:
    for lock in [devicelock.acquire(f"{index}.0") for index in range(2)]:
        os.close(lock)


def test_a_lock_file_of_another_user_will_do(tmp_path: Path) -> None:
    (tmp_path / "zfleet-gpu0.0.lock").touch(0o444)
    os.close(devicelock.acquire("0.0"))


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "zfleet-gpu0.0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        devicelock.acquire("0.0")
