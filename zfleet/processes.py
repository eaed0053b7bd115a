"""Child processes that never outlive their parent, whichever way it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from zfleet import guardian

POLL_S = 0.05


class Child:
    """A program in a process group of its own, so that Ctrl-C reaches the parent alone; its output goes to a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        output: Path,
        rank: int,
        grace_s: float,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts nothing yet. `rank`: higher ones are stopped first; `grace_s`: from SIGTERM to SIGKILL."""
        self.name = name
        self.command = list(command)
        self.output = output
        self.rank = rank
        self.grace_s = grace_s
        self.started_at = 0.0  # time.monotonic()
        self._env = dict(env)
        self._cwd = cwd
        self._pass_fds = tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the program, anew if it has ended."""
        with self.output.open("ab") as file:
            self._process = subprocess.Popen(
                self.command,
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=self._pass_fds,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End the program and all it started; `hurry` cuts the grace short."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        until = time.monotonic() + self.grace_s
        while self._process.poll() is None and time.monotonic() < until and not hurry():
            time.sleep(POLL_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def tail(self, lines: int) -> list[str]:
        """Return the last lines of its output."""
        try:
            with self.output.open(encoding="utf-8", errors="replace") as file:
                return [line.rstrip() for line in deque(file, lines)]
        except OSError:
            return []


class Guardian:
    """Our end of the guardian process, which stops our children should we be killed."""

    def __init__(self, *, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        """`env` is its environment (None: ours); `pass_fds` stay open until it has done its work, as a lock has to."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guardian.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=env,
            pass_fds=pass_fds,
            start_new_session=True,
            text=True,
        )

    def watch(self, child: Child) -> None:
        """Stop this child should we die."""
        self._tell(f"start {child.pid} {child.rank} {child.grace_s}")

    def forget(self, pid: int) -> None:
        """Leave this process id alone: it has ended, and the number may be another's soon."""
        self._tell(f"gone {pid}")

    def close(self) -> None:
        """Let the guardian stop what is still listed, and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        self._process.wait()

    @property
    def _pipe(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guardian; the children are still ours
            self._pipe.write(line + "\n")
            self._pipe.flush()
