"""The rendered Nginx configuration as a file: what Nginx says of it, and which arguments are refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.nginx_edge import ROOT, SCRIPT, USER, nginx_binary, render, self_signed


@pytest.mark.parametrize("unprivileged", [False, True] if ROOT else [True])
def test_config_is_clean(unprivileged: bool, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as run:
        os.chown(run, *((65534, 65534) if ROOT and unprivileged else (-1, -1)))
        cert, key = (shutil.copy(path, run) for path in self_signed(tmp_path))
        Path(key).chmod(0o644)
        for tls in ({}, {"tls_cert": cert, "tls_key": key, "tls_listen": "127.0.0.1:8443"}):
            text = render(
                gateways=["127.0.0.1:8000", "localhost:8001", "[::1]:8002"],
                results_dir=f'{run}/results of "the" \\fleet; {{#1}}',
                run_dir=run,
                listen=["127.0.0.1:8080", "8081"],
                server_name="a.example *.b.example",
                user=None if unprivileged else USER,
                **tls,
            )
            conf = Path(run, "nginx.conf")
            conf.write_text(text)
            command = [nginx_binary(), "-t", "-p", run, "-c", str(conf)]
            user = 65534 if ROOT and unprivileged else None
            checked = subprocess.run(command, capture_output=True, text=True, user=user, check=False)
            assert checked.returncode == 0, checked.stderr
            assert not re.search(r"\[(warn|error|alert|emerg)\]", checked.stderr), checked.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"results_dir": "relative"}, "results-dir"),
        ({"results_dir": "/"}, "results-dir"),
        ({"results_dir": "/a/$b"}, "results-dir"),
        ({"run_dir": "/a\nb"}, "run-dir"),
        ({"gateways": []}, "gateway"),
        ({"gateways": ["h:1; }"]}, "gateway"),
        ({"gateways": "nowhere"}, "gateway"),
        ({"listen": "70000"}, "listen"),
        ({"rate": "0r/s"}, "rate"),
        ({"burst": -1}, "burst"),
        ({"connections": 0}, "connections"),
        ({"bodies": 70_000}, "bodies"),
        ({"user": "a b"}, "user"),
        ({"server_name": "a;b"}, "server-name"),
        ({"worker_processes": "0"}, "workers"),
        ({"tls_cert": "/c"}, "tls-key"),
        ({"tls_cert": "/c", "tls_key": "/k", "nginx_version": "new"}, "nginx-version"),
    ],
)
def test_bad_argument_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        render(**{"gateways": "h:1", "results_dir": "/r", "run_dir": "/run"} | options)


def test_http2_is_spelt_as_the_version_wants() -> None:
    needed = {"gateways": "h:1", "results_dir": "/r", "run_dir": "/run", "tls_cert": "/c", "tls_key": "/k"}
    assert "listen 443 ssl http2;" in render(**needed, nginx_version="1.25.0")
    newer = render(**needed, nginx_version="1.28")
    assert "listen 443 ssl;" in newer and "http2 on;" in newer
    assert "return 308 https://$host$request_uri;" in newer


def test_command_line() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    needed = ("--gateway", "h:1", "--gateway", "h:2", "--results-dir", "/r r", "--run-dir", "/run")
    assert run(*needed).stdout == render(gateways=["h:1", "h:2"], results_dir="/r r", run_dir="/run")
    assert "--tls-cert" in run("--help").stdout
    for bad in ([], ["--burst", "many", *needed], ["--listen", "0", *needed], ["--nonsense", *needed]):
        refused = run(*bad)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1), refused
