"""What kustomize makes of deploy/kubernetes, and a process as a pod would run it."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.servers import Server, binary

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
WORKLOADS = ("Deployment", "StatefulSet")
# as in a pod: number 1 among its processes, its disk read-only but for one folder
ISOLATED = 'mount --bind "$WRITABLE" "$WRITABLE"; mount -o remount,bind,ro /; exec "$@"'


@functools.cache
def built(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """Everything that `kubectl apply -k` of this folder would apply."""
    command = [binary("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(objects: Sequence[Mapping[str, Any]], *kinds: str) -> Iterator[Mapping[str, Any]]:
    return (found for found in objects if found["kind"] in kinds)


def pod(workload: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = workload["spec"]["template"]["spec"]
    assert len(found["containers"]) == 1
    return found


def container(workload: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = pod(workload)["containers"][0]
    return found


def variables(objects: Sequence[Mapping[str, Any]], workload: Mapping[str, Any]) -> dict[str, str | None]:
    """A container's environment; None for what a Secret holds."""
    maps = {found["metadata"]["name"]: found["data"] for found in of_kind(objects, "ConfigMap")}
    found: dict[str, str | None] = {}
    for source in container(workload).get("envFrom", ()):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]
    return found | {one["name"]: one.get("value") for one in container(workload).get("env", ())}


def as_in_a_pod(server: Server, writable: Path) -> Server:
    """Have a server, not started yet, run so. It wants root."""
    assert os.geteuid() == 0, "run as root, as CI does: it makes namespaces"
    server.env = dict(server.env or os.environ) | {"WRITABLE": str(writable)}
    isolate = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    server.command[:0] = [binary("unshare"), *isolate, "sh", "-ec", ISOLATED, "sh"]
    return server


def first_process(server: Server) -> int:
    """The pid, seen from outside, of the process that is number 1 inside."""
    (child,) = psutil.Process(server.pid).children()
    return child.pid


def exec_inside(server: Server, command: Sequence[str]) -> int:
    """Run a command as `kubectl exec` or a hook would; return its exit code, or what it was killed by, negative."""
    enter = [binary("nsenter"), "--target", str(first_process(server)), "--mount", "--pid"]
    return subprocess.run([*enter, *command], env=server.env, timeout=60, check=False, capture_output=True).returncode
