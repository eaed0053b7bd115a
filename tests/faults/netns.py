"""Hosts of their own for a test: network namespaces, each joined to the test's by a cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from typing import Self

import pytest

from tests.servers import Server, binary


class Switch:
    """What joins several hosts to each other and to here, where its address is `near_address`."""

    def __init__(self) -> None:
        self.name = f"zf{secrets.token_hex(3)}s"
        self._net = f"10.78.{secrets.randbelow(256)}"
        self._hosts = 1
        self.near_address = f"{self._net}.1"

    def another_address(self) -> str:
        self._hosts += 1
        return f"{self._net}.{self._hosts}"

    def __enter__(self) -> Self:
        _require_root()
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.near_address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "delete", self.name)


class Host:
    """A network namespace that knows nothing but one cable, to here or to a switch. It is gone when the test is."""

    def __init__(self, switch: Switch | None = None) -> None:
        tag = secrets.token_hex(3)
        self._name = f"zfleet-{tag}"
        self._near, self._far = f"zf{tag}n", f"zf{tag}f"  # the two ends; a device's name has 15 letters at most
        self._switch = switch
        if switch:
            self.near_address, self.far_address = switch.near_address, switch.another_address()
        else:
            net = f"10.77.{secrets.randbelow(256)}"
            self.near_address, self.far_address = f"{net}.1", f"{net}.2"

    def run_here(self, server: Server) -> Server:
        """Make a server that has not started run on this host."""
        server.command[:0] = [binary("ip"), "netns", "exec", self._name]
        return server

    def pull_cable(self) -> None:
        """From now on nothing arrives, either way, and nobody is told."""
        _ip("link", "set", self._near, "down")

    def plug_cable(self) -> None:
        _ip("link", "set", self._near, "up")

    def __enter__(self) -> Self:
        _require_root()
        _ip("netns", "add", self._name)
        try:
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
            if self._switch:
                _ip("link", "set", self._near, "master", self._switch.name)
            else:
                _ip("address", "add", f"{self.near_address}/24", "dev", self._near)
            _ip("link", "set", self._near, "up")
            _ip("-netns", self._name, "address", "add", f"{self.far_address}/24", "dev", self._far)
            for device in ("lo", self._far):
                _ip("-netns", self._name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pid in _ip("netns", "pids", self._name).split():  # what a failed test has left there
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run([binary("ip"), "link", "delete", self._near], capture_output=True, check=False)
        _ip("netns", "delete", self._name)


def _require_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("only root may make network namespaces; run this test as root, as in a container")


def _ip(*arguments: str) -> str:
    done = subprocess.run([binary("ip"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
