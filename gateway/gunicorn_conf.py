"""gunicorn's configuration, from ZFLEET_ settings: gunicorn -c python:gateway.gunicorn_conf"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import listening, tracing
from common.servicemanager import service_manager
from common.settings import load_settings

settings = load_settings()
manager = service_manager(
    settings.alive_file
)  # now, or gunicorn itself would tell it that all is ready before any worker is

wsgi_app = "gateway.wsgi:app"
worker_class = "gateway.gunicorn_worker.Worker"
workers = settings.gateway_workers
worker_connections = settings.gateway_connections
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
backlog = 2048

timeout = 60  # seconds without a sign of life from a worker's event loop, not of a request
graceful_timeout = 30  # seconds that requests under way have after SIGTERM; waiting ones are answered at once
keepalive = 75  # seconds; longer than Nginx keeps an idle connection to us (60), so that it is never the one surprised

limit_request_line = 8190  # bytes, as in Nginx
limit_request_fields = 100
limit_request_field_size = 8190

forwarded_allow_ips = ""  # admission.py and links.py read X-Forwarded-* themselves, and say whom they believe

accesslog = None  # Nginx has one, and requestlog.py writes a line a request
loglevel = "info" if settings.log_level == "debug" else "warning"
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # the signs of life; a busy disk would delay them

# Each connection is a file, and the usual soft limit is 1,024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))


def on_starting(server: Any) -> None:
    """Stop with exit code 2 before anything listens beyond this machine while nobody needs a key.

    Redis is asked by another process: its client must not be imported here before gevent has patched the workers.
    """
    bound = [settings.host if isinstance(at, int) else at[0] for at in server.cfg.address if not isinstance(at, str)]
    hosts = [host for host in bound if listening.beyond_loopback(host)]
    if hosts and not settings.insecure:
        command = [sys.executable, "-m", listening.__name__, *hosts]
        if code := subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode:
            sys.exit(code)


def when_ready(server: Any) -> None:
    """Have the arbiter give systemd a sign of life after each look at its workers, about once a second, if one lives.

    So a hung arbiter is found out; hung workers are by the arbiter, after `timeout`. gunicorn has no hook for this.
    """
    look = server.murder_workers

    def look_and_tell() -> None:
        look()
        now, workers = time.monotonic(), server.WORKERS.values()
        # until its first sign a worker's file has the time of day, which is later than any time since boot
        if live := sum(0 <= now - worker.tmp.last_update() < timeout for worker in workers):
            manager.ready()
            manager.alive(f"{live} of {server.num_workers} gateway processes answer")

    server.murder_workers = look_and_tell


def on_exit(_server: Any) -> None:
    manager.stopping()


def worker_exit(_server: Any, _worker: Any) -> None:
    """Send the traces that wait to be sent."""
    tracing.close()


def post_worker_init(_worker: Any) -> None:
    """Look for garbage in cycles less often, and not among what is there for good.

    With thousands of requests that wait, a look at everything stops all others for a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)
