"""The units of deploy/systemd, and what of their sandbox can be had without systemd.

`python -m tests.deploy.units UNIT COMMAND …` keeps to the unit's system calls and address families and to its word on
memory that is both written and run, and then becomes the command. The kernel enforces that as it would for systemd.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
GATEWAY, WEBHOOKS, WORKER = "zfleet-gateway.service", "zfleet-webhooks.service", "zfleet-worker@.service"
SERVICES = (GATEWAY, WEBHOOKS, WORKER)

_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN = 65, 1
_ACT_ALLOW, _ACT_ERRNO = 0x7FFF0000, 0x00050000
_CMP_EQ = 4


def directives(unit: str) -> dict[str, list[str]]:
    """Return the unit's directives, each with its values in order."""
    found = defaultdict(list)
    for line in (FOLDER / unit).read_text("utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return dict(found)


@functools.cache
def _sets() -> dict[str, list[str]]:
    told = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for line in told.splitlines():
        if line.startswith("@"):
            found[line.strip()] = []
        elif line.startswith("    ") and not line.strip().startswith("#") and found:
            found[next(reversed(found))].append(line.strip())
    return found


def _calls(name: str) -> Iterator[str]:
    if not name.startswith("@"):
        yield name
        return
    for member in _sets()[name]:
        yield from _calls(member)


def allowed_calls(unit: str) -> set[str]:
    """Return the system calls that the unit allows, as its SystemCallFilter lines add up, beside @default."""
    allowed = set(_calls("@default"))
    for line in directives(unit)["SystemCallFilter"]:
        change = allowed.difference_update if line.startswith("~") else allowed.update
        for name in line.lstrip("~").split():
            change(set(_calls(name)))
    return allowed


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _confine(unit: str) -> None:
    calls, families = allowed_calls(unit), directives(unit)["RestrictAddressFamilies"][0].split()
    libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_ACT_ERRNO | errno.EPERM))
    for call in sorted(calls - {"socket"}):
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # others are another architecture's
            assert seccomp.seccomp_rule_add_array(context, _ACT_ALLOW, number, 0, None) == 0, call
    number = seccomp.seccomp_syscall_resolve_name(b"socket")
    for family in families:
        only = _Comparison(0, _CMP_EQ, getattr(socket, family), 0)
        assert seccomp.seccomp_rule_add_array(context, _ACT_ALLOW, number, 1, ctypes.byref(only)) == 0, family
    if directives(unit).get("MemoryDenyWriteExecute") == ["yes"]:
        assert libc.prctl(_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0 or ctypes.get_errno() == errno.EINVAL
    assert seccomp.seccomp_load(context) == 0, "needs no_new_privs"


def sandboxed(unit: str, command: list[str], *writable: Path) -> list[str]:
    """Return what runs the command as in the unit's sandbox, where nothing but these folders can be written."""
    binds = " && ".join(f'mount --bind "{path}" "{path}"' for path in writable)
    inside = [sys.executable, "-m", __name__, unit, *command]
    bare = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", *inside]
    return ["unshare", "--mount", "sh", "-c", f'{binds} && mount -o remount,bind,ro / && exec "$@"', "sh", *bare]


if __name__ == "__main__":
    _confine(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
