"""The local stack: an embedded Redis, the gateway, webhooks' courier and the workers as child processes of this one."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from common import listening
from common.broker import Broker
from common.errors import ConfigurationError, FleetError, RedisUnavailable
from common.settings import Settings, child_environment, load_settings, mask_url
from zfleet import machine, redis_server
from zfleet.client import Client
from zfleet.interrupts import Interrupts
from zfleet.processes import Child, Guardian
from zfleet.trouble import Trouble

REDIS_PORT = 6379  # the one that ZFLEET_REDIS_URL defaults to, so that one more worker here needs no setting
POLL_S = 0.1
READY_POLL_S = 0.25
REDIS_START_S = 20.0
REDIS_PORT_TRIES = 5
READY_TIMEOUT_S = 3.0
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 10.0
STEADY_S = 60.0  # a child that lived this long starts its back-off afresh
TAIL_LINES = 15
BAD_CONFIGURATION = 2  # a child's exit code
COMPLAINT = "zfleet: "  # how every complaint of ours begins

REDIS_GRACE_S = 10.0
GATEWAY_GRACE_S = 5.0
COURIER_GRACE_S = 6.0
LOADING_GRACE_S = 3.0  # a worker that still loads its model has nothing to finish, and may not look up for minutes
WORKER_MARGIN_S = 15.0  # beyond the drain time
# Stopped from the highest down: a worker has to hand in its work, and then webhooks are told of it.
REDIS_RANK, GATEWAY_RANK, COURIER_RANK, WORKER_RANK = range(4)


class StackFailed(FleetError):
    """Raised when a part of the local stack does not start."""

    code = "stack_failed"


class Reporter(Protocol):
    """Whoever tells the user what goes on."""

    def say(self, text: str) -> None:
        """Show a line."""

    def waiting(self, text: str) -> None:
        """Show what is being waited for; called again and again until something else is said."""


@dataclass
class Restart:
    """When a child that has ended is started again."""

    at: float
    backoff_s: float


class Stack:
    """Everything zfleet needs, on this machine, for as long as the `with` block lasts.

    Uses the Redis of ZFLEET_REDIS_URL where that is set, else an embedded one with its data in `data_dir`/redis. A port
    that is taken is replaced by a free one. A data directory is one stack's at a time. However this process ends, its
    children end with it: workers first, Redis last.
    """

    def __init__(
        self,
        settings: Settings,
        reporter: Reporter,
        interrupts: Interrupts,
        *,
        embedded: bool | None = None,
        redis_port: int = REDIS_PORT,
    ) -> None:
        """`interrupts` keeps signals away from what they must not break in two; it need not be entered.

        `embedded`: whether to bring a Redis along; None goes by the settings. `redis_port`: where; 0 is any free port.
        """
        self.settings = settings
        self.guarded = False  # whether calls need an API key
        self._embedded = "redis_url" not in settings.model_fields_set if embedded is None else embedded
        self._redis_port = redis_port
        self._reporter = reporter
        self._interrupts = interrupts
        self._logs = settings.data_dir / "logs"
        self._children: list[Child] = []
        self._restarts: dict[str, Restart] = {}
        self._lock: IO[str] | None = None
        self._listener: socket.socket | None = None
        self._guardian: Guardian | None = None
        self._trouble: Trouble | None = None

    @property
    def url(self) -> str:
        """Where the gateway answers, once entered."""
        return self.settings.url

    @property
    def log_dir(self) -> Path:
        """Where the children's output and, unless ZFLEET_LOG_DIR says otherwise, their logs are."""
        return self._logs

    def __enter__(self) -> Self:
        """Start everything and wait until pictures can be made; raises StackFailed, ConfigurationError."""
        machine.require_packages(self.settings)
        machine.require_templates(self.settings)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise StackFailed, after showing the end of its log, if a child has died or the workers cannot work."""
        for child in self._children:
            if not child.running:
                said = child.tail(1)
                if child.exit_code == BAD_CONFIGURATION and said and said[0].startswith(COMPLAINT):
                    raise ConfigurationError(said[0].removeprefix(COMPLAINT))
                self._fail(f"the {child.name} ended with {_ending(child.exit_code)}", child)
        if self._trouble and (message := self._trouble.message()):
            self._fail(f"the worker failed: {message}", None)

    def mend(self) -> None:
        """Start again what has died, with back-off. To be called a few times a second while the stack is up."""
        now = time.monotonic()
        for child in self._children:
            if child.running:
                continue
            restart = self._restarts.get(child.name)
            if restart is None or restart.at < child.started_at:
                steady = restart is None or now - child.started_at >= STEADY_S
                backoff_s = FIRST_BACKOFF_S if steady or not restart else min(LONGEST_BACKOFF_S, restart.backoff_s * 2)
                self._restarts[child.name] = Restart(now + backoff_s, backoff_s)
                ending = _ending(child.exit_code)
                self._reporter.say(f"The {child.name} ended with {ending}; starting it again in {backoff_s:g} s.")
                if self._guardian:
                    self._guardian.forget(child.pid)
            elif now >= restart.at:
                self._launch(child)

    def stop(self) -> None:
        """Stop everything, in order. Safe to call twice."""
        with self._interrupts.held():
            if self._children:
                self._reporter.say("Stopping …")
            for child in sorted(self._children, key=lambda child: -child.rank):
                child.stop(lambda: self._interrupts.hurry)
                if self._guardian:
                    self._guardian.forget(child.pid)
            self._children.clear()
            if self._guardian:
                self._guardian.close()
                self._guardian = None
            for resource in (self._listener, self._lock):
                if resource:
                    resource.close()
            self._listener = self._lock = None

    def _start(self) -> None:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            self._lock = machine.lock(self.settings.data_dir, self._reporter.waiting)
        except OSError as error:
            raise ConfigurationError(f"ZFLEET_DATA_DIR {self.settings.data_dir}: {error.strerror}") from None
        with self._interrupts.held():
            self._guardian = Guardian(env=child_environment(self.settings), pass_fds=[self._lock.fileno()])
        self._start_redis()
        self._require_keys()
        self._open_port()
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} {self.url}\n")
        self._lock.flush()
        self._trouble = Trouble(self.settings.log_dir or self._logs)
        self._start_gateway()
        self._start_courier()
        self._start_worker()

    def _open_port(self) -> None:
        """Listen ourselves and hand the socket down: nobody can take the port in between, not even over a restart."""
        host, port = self.settings.host, self.settings.port
        self._listener = machine.listen(host, port)
        chosen = self._listener.getsockname()[1]
        if port not in (0, chosen):
            self._reporter.say(f"Port {port} is taken; the gateway gets {chosen}.")
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._change(
            port=chosen, url=f"http://[{reachable}]:{chosen}" if ":" in reachable else f"http://{reachable}:{chosen}"
        )

    def _start_redis(self) -> None:
        if not self._embedded:
            try:
                self._probe(self.settings.redis_patience_s)
            except RedisUnavailable:
                raise StackFailed(f"no Redis answers at {mask_url(self.settings.redis_url)}") from None
            return
        executable = redis_server.find()
        folder = self.settings.data_dir / "redis"
        folder.mkdir(mode=0o700, exist_ok=True)  # prompts are in there
        port = machine.free_port(self._redis_port)
        if self._redis_port not in (0, port):
            self._reporter.say(f"Port {self._redis_port} is taken; Redis gets {port}.")
        for _ in range(REDIS_PORT_TRIES):
            self._reporter.say(f"Starting Redis {'.'.join(map(str, executable.version))} on port {port} …")
            child = self._child(
                "redis",
                redis_server.command(executable, port, folder),
                cwd=folder,
                rank=REDIS_RANK,
                grace_s=REDIS_GRACE_S,
            )
            self._change(redis_url=f"redis://127.0.0.1:{port}/0")
            self._launch(child)
            if self._redis_answers(child):
                return
            if "in use" not in " ".join(child.tail(TAIL_LINES)):
                break
            self._children.remove(child)
            port = machine.free_port(0)  # somebody was faster
        self._fail("Redis did not start", child)

    def _redis_answers(self, child: Child) -> bool:
        """Wait until the embedded Redis has read its AOF and takes writes; False when it ended instead."""
        until = time.monotonic() + REDIS_START_S
        while child.running:
            with contextlib.suppress(RedisUnavailable):
                self._probe(0.0)
                if child.running:  # else something else answers on that port
                    return True
            if time.monotonic() > until:
                self._reporter.waiting("Redis reads its data")
            time.sleep(POLL_S)
        return False

    def _probe(self, patience_s: float) -> None:
        with contextlib.closing(Broker(self.settings, patience_s=patience_s)) as broker:
            broker.probe()

    def _require_keys(self) -> None:
        """Raise ConfigurationError where other machines would reach a fleet that nobody needs a key for."""
        listening.check([self.settings.host], self.settings)
        with contextlib.closing(Broker(self.settings)) as broker:
            self.guarded = broker.guarded()

    def _start_gateway(self) -> None:
        self._reporter.say("Starting the gateway …")
        assert self._listener is not None
        number = self._listener.fileno()
        command = [*machine.gateway_command(), "--bind", f"fd://{number}", "gateway.wsgi:app"]
        self._launch(self._child("gateway", command, rank=GATEWAY_RANK, grace_s=GATEWAY_GRACE_S, pass_fds=[number]))

    def _start_courier(self) -> None:
        self._launch(self._child("webhooks", machine.courier_command(), rank=COURIER_RANK, grace_s=COURIER_GRACE_S))

    def _start_worker(self) -> None:
        self._reporter.say(f"Starting the worker for {', '.join(self.settings.models)} …")
        worker = self._child("worker", machine.worker_command(), rank=WORKER_RANK, grace_s=LOADING_GRACE_S)
        self._launch(worker)
        self._await_ready()
        worker.grace_s = self.settings.drain_s + WORKER_MARGIN_S
        if self._guardian:
            self._guardian.watch(worker)

    def _await_ready(self) -> None:
        alone = contextlib.closing(Broker(self.settings, patience_s=0.0))
        with Client(self.url, timeout_s=READY_TIMEOUT_S) as client, alone as broker:
            while True:
                self.check()
                if client.ready() is None:
                    with contextlib.suppress(RedisUnavailable):
                        if any(worker.state != "loading" for worker in broker.workers()):
                            return
                    self._reporter.waiting("the worker loads its model")
                else:
                    self._reporter.waiting("the gateway and the worker start")
                time.sleep(READY_POLL_S)

    def _child(
        self,
        name: str,
        command: list[str],
        *,
        rank: int,
        grace_s: float,
        cwd: Path = machine.HOME,
        pass_fds: list[int] | None = None,
    ) -> Child:
        log_dir = self.settings.log_dir or self._logs
        env = child_environment(self.settings, ZFLEET_LOG_DIR=str(log_dir))
        output = self._logs / f"{name}.out"
        output.write_bytes(b"")
        return Child(
            name, command, env=env, cwd=cwd, output=output, rank=rank, grace_s=grace_s, pass_fds=pass_fds or ()
        )

    def _launch(self, child: Child) -> None:
        with self._interrupts.held():
            child.start()
            if child not in self._children:
                self._children.append(child)
            if self._guardian:
                self._guardian.watch(child)

    def _fail(self, message: str, child: Child | None) -> None:
        lines = child.tail(TAIL_LINES) if child else []
        if not lines and self._trouble:
            lines = self._trouble.tail(TAIL_LINES)
        for line in lines:
            self._reporter.say(f"  | {line}")
        raise StackFailed(f"{message}; its log is in {self._logs}")

    def _change(self, **changes: object) -> None:
        """Set what turned out while starting. Through the environment, these reach every child."""
        given = {name: getattr(self.settings, name) for name in self.settings.model_fields_set}
        self.settings = load_settings(given | changes)


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
