"""Render the fleet's Nginx configuration from `nginx.conf.template`.

Prints a complete nginx.conf: `python deploy/nginx/render.py --gateway 127.0.0.1:8000 --results-dir /srv/zfleet/results
--run-dir /var/lib/zfleet-nginx > /etc/nginx/nginx.conf`. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NoReturn

DEFAULT_RATE = "10r/s"  # sustained submissions per client address
DEFAULT_BURST = 40  # submissions accepted above the rate before the first 429
DEFAULT_CONNECTIONS = 1024  # requests under way at once per client address: long polls, streams
DEFAULT_BODIES = 128  # of those, with a body: submissions, and OpenAI's calls until their image is there
MOST_CONNECTIONS = 65_535  # that Nginx can count to
HTTP2_DIRECTIVE_SINCE = (1, 25, 1)  # from here on `http2 on;` replaces the parameter of `listen`

_HOST = r"(?:[A-Za-z0-9_*.-]+|\[[0-9A-Fa-f:.]+\])"
_TEMP_DIRS = ("body", "proxy", "fastcgi", "uwsgi", "scgi")


class NginxTemplate(Template):
    """A template whose placeholders are `%{name}`, since Nginx has its own use for `$`."""

    delimiter = "%"


def render(
    *,
    gateways: str | Sequence[str],
    results_dir: str | Path,
    run_dir: str | Path,
    listen: str | Sequence[str] = "80",
    server_name: str = "_",
    rate: str = DEFAULT_RATE,
    burst: int = DEFAULT_BURST,
    connections: int = DEFAULT_CONNECTIONS,
    bodies: int = DEFAULT_BODIES,
    user: str | None = None,
    worker_processes: str = "auto",
    pid_file: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    tls_listen: str | Sequence[str] = "443",
    nginx_version: str = "1.22.1",
    log_dir: str | Path | None = None,
) -> str:
    """Return a complete nginx.conf; raise ValueError, naming the argument, for a value Nginx could not use.

    gateways: `host:port` of each gateway. results_dir: where the local storage keeps the images; run_dir: an existing
    directory for the pid file, logs and temporary files; both absolute. listen, tls_listen: `port` or `address:port`.
    rate: sustained submissions per client address, `<n>r/s` or `<n>r/m`; burst: how many more are accepted at once.
    connections: requests under way at once per client address; bodies: how many of them may have a body.
    user: whom the workers run as, `name` or `name:group`; only for a master started as root (Nginx warns otherwise).
    pid_file: default `run_dir/nginx.pid`. tls_cert, tls_key: PEM files; with them the service is on tls_listen, and
    listen redirects there. nginx_version: the version that will read the file; it decides how HTTP/2 is spelt.
    log_dir: where access.log and error.log are, default run_dir.
    """
    plain_ports = [_address("listen", value, host_required=False) for value in _several("listen", listen)]
    servers = [_address("gateway", value, host_required=True) for value in _several("gateway", gateways)]
    results, run = _path("results-dir", results_dir), _path("run-dir", run_dir)
    logs = _path("log-dir", log_dir) if log_dir is not None else run
    pid = _path("pid-file", pid_file) if pid_file is not None else f"{run}/nginx.pid"
    names = _matching("server-name", server_name, r"[A-Za-z0-9_*.-]+(?: [A-Za-z0-9_*.-]+)*", "host names")
    workers = _matching("workers", worker_processes, r"auto|[1-9]\d{0,2}", "a number from 1 to 999, or auto")
    if burst < 0:
        raise ValueError(f"burst: {burst} is negative")
    for name, count in (("connections", connections), ("bodies", bodies)):
        if not 1 <= count <= MOST_CONNECTIONS:
            raise ValueError(f"{name}: {count} is not between 1 and {MOST_CONNECTIONS}")

    redirect, tls = "", ""
    listens = [f"listen {port};" for port in plain_ports]
    if tls_cert is not None or tls_key is not None:
        if tls_cert is None or tls_key is None:
            raise ValueError("tls-cert and tls-key: give both, or neither")
        tls_ports = [_address("tls-listen", value, host_required=False) for value in _several("tls-listen", tls_listen)]
        redirect = _redirect_server(listens, names, tls_ports[0])
        as_directive = _version(nginx_version) >= HTTP2_DIRECTIVE_SINCE
        listens = [f"listen {port} ssl;" if as_directive else f"listen {port} ssl http2;" for port in tls_ports]
        listens += ["http2 on;"] if as_directive else []
        tls = _tls_settings(_path("tls-cert", tls_cert), _path("tls-key", tls_key))

    template = NginxTemplate((Path(__file__).parent / "nginx.conf.template").read_text(encoding="utf-8"))
    return template.substitute(
        {f"{name}_temp": _quoted(f"{run}/{name}_temp") for name in _TEMP_DIRS},
        user=_user(user),
        worker_processes=workers,
        pid=_quoted(pid),
        error_log=_quoted(f"{logs}/error.log"),
        access_log=_quoted(f"{logs}/access.log"),
        rate=rate,
        retry_after_s=_seconds_per_request(rate),
        burst=burst,
        connections=connections,
        bodies=bodies,
        gateways="\n".join(f"        server {server} max_fails=3 fail_timeout=5s;" for server in servers),
        redirect_server=redirect,
        listen="\n".join(f"        {line}" for line in listens),
        server_name=names,
        tls=tls,
        results_alias=_quoted(f"{results}/"),
        results_from=_quoted(f"from={results}"),
    )


def _redirect_server(listens: Sequence[str], names: str, tls_port: str) -> str:
    """Return the plain-HTTP server that sends every request to the TLS port, method and body kept (308)."""
    port = tls_port.rpartition(":")[2]
    target = "https://$host" + ("" if port == "443" else f":{port}") + "$request_uri"
    lines = [*listens, f"server_name {names};", f"location / {{ return 308 {target}; }}"]
    return "\n    server {\n" + "\n".join(f"        {line}" for line in lines) + "\n    }\n"


def _tls_settings(cert: str, key: str) -> str:
    """Return the TLS lines of the server: 1.2 and up, forward secrecy only."""
    lines = (
        f"ssl_certificate {_quoted(cert)};",
        f"ssl_certificate_key {_quoted(key)};",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        "ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;",
        "ssl_prefer_server_ciphers off;",
        "ssl_session_cache shared:zfleet_tls:10m;",
        "ssl_session_timeout 1d;",
        "ssl_session_tickets off;",
    )
    return "".join(f"        {line}\n" for line in lines)


def _several(name: str, value: str | Sequence[str]) -> list[str]:
    """Return `value` as a list with at least one entry."""
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise ValueError(f"{name}: at least one is needed")
    return values


def _address(name: str, value: str, *, host_required: bool) -> str:
    """Return `value` if it is `host:port` (or, where no host is required, a port alone)."""
    form = "host:port" if host_required else "a port or address:port"
    optional = "" if host_required else "?"
    _matching(name, value, rf"(?:{_HOST}:){optional}\d{{1,5}}", form)
    if not 1 <= int(value.rpartition(":")[2]) <= 65535:
        raise ValueError(f"{name}: the port of {value!r} is not between 1 and 65535")
    return value


def _path(name: str, value: str | Path) -> str:
    """Return an absolute path, no slash at its end, refusing what an Nginx string cannot carry."""
    path = str(value).rstrip("/")
    if not path.startswith("/"):
        raise ValueError(f"{name}: {str(value)!r} is not an absolute path below /")
    if "$" in path or not path.isprintable():
        raise ValueError(f"{name}: {path!r} has a $ or an unprintable character, which Nginx cannot take in a path")
    return path


def _quoted(text: str) -> str:
    """Return `text` as one Nginx argument, whatever spaces, quotes or backslashes it holds."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _matching(name: str, value: str, pattern: str, form: str) -> str:
    """Return `value` if all of it matches `pattern`."""
    if re.fullmatch(pattern, value, flags=re.ASCII) is None:
        raise ValueError(f"{name}: {value!r} is not {form}")
    return value


def _user(user: str | None) -> str:
    """Return the `user` directive, or a comment where the master has no user to switch to."""
    if user is None:
        return "# No user directive: the workers run as whoever starts Nginx, or as its built-in user under root."
    name = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    return f"user {_matching('user', user, f'{name}(?::{name})?', 'name or name:group').replace(':', ' ')};"


def _seconds_per_request(rate: str) -> int:
    """Return after how many whole seconds one more request is accepted at `rate`: what Retry-After should say."""
    _matching("rate", rate, r"[1-9]\d{0,5}r/[sm]", "<n>r/s or <n>r/m")
    count, _, unit = rate.partition("r/")
    return math.ceil((60 if unit == "m" else 1) / int(count))


def _version(text: str) -> tuple[int, ...]:
    """Return `1.22.1` as (1, 22, 1)."""
    _matching("nginx-version", text, r"\d+(?:\.\d+){1,2}", "a version such as 1.22.1")
    return tuple(map(int, text.split(".")))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Print the fleet's nginx.conf.", allow_abbrev=False)
    add = parser.add_argument
    add("--listen", action="append", metavar="PORT", help="port or address:port; may be repeated (default: 80)")
    add("--gateway", action="append", required=True, metavar="HOST:PORT", help="a gateway; may be repeated")
    add("--results-dir", required=True, metavar="DIR", help="where the local storage keeps the images, absolute")
    add("--run-dir", required=True, metavar="DIR", help="existing directory for pid, logs, temporary files, absolute")
    add("--pid-file", metavar="FILE", help="the pid file, if not nginx.pid in the run directory")
    add("--log-dir", metavar="DIR", help="existing directory for the logs, if not the run directory")
    add("--server-name", default="_", metavar="NAMES", help="host names, separated by spaces (default: any)")
    add("--rate", default=DEFAULT_RATE, help="submissions per client address, <n>r/s or <n>r/m (default: %(default)s)")
    add("--burst", type=int, default=DEFAULT_BURST, help="submissions above the rate at once (default: %(default)s)")
    add("--connections", type=int, default=DEFAULT_CONNECTIONS, help="requests at once per client address")
    add("--bodies", type=int, default=DEFAULT_BODIES, help="of those, with a body (default: %(default)s)")
    add("--user", metavar="NAME[:GROUP]", help="whom the workers run as; only if Nginx is started as root")
    add("--workers", default="auto", metavar="N", help="worker processes (default: one per core)")
    add("--tls-cert", metavar="FILE", help="PEM certificate chain; turns TLS on")
    add("--tls-key", metavar="FILE", help="PEM key of the certificate")
    add("--tls-listen", action="append", metavar="PORT", help="port or address:port of TLS (default: 443)")
    add("--nginx-version", default="1.22.1", metavar="V", help="the version that will read it (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the configuration to stdout, or one line to stderr with exit code 2."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    options["listen"] = options["listen"] or "80"
    options["tls_listen"] = options["tls_listen"] or "443"
    options["gateways"] = options.pop("gateway")
    options["worker_processes"] = options.pop("workers")
    try:
        sys.stdout.write(render(**options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
