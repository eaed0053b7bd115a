"""Where a webhook may lead, by its form and by what its name stands for."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError, InvalidRequest
from gateway.webhooks.targets import Refused, Target, Targets, public

OPEN = Targets()


@pytest.mark.parametrize(
    ("url", "netloc", "path"),
    [
        ("https://hooks.example/a/b?c=d#e", "hooks.example", "/a/b?c=d"),
        ("HTTPS://Hooks.EXAMPLE", "hooks.example", "/"),
        ("https://hooks.example:8443/é x", "hooks.example:8443", "/%C3%A9%20x"),
        ("https://bücher.example/", "xn--bcher-kva.example", "/"),
        ("https://hooks.example.:443/", "hooks.example", "/"),
        ("https://8.8.8.8/", "8.8.8.8", "/"),
        ("https://134744072/", "8.8.8.8", "/"),
        ("https://[2606:4700::1111]:444/", "[2606:4700::1111]:444", "/"),
        ("https://hooks.example/\r\nX-Evil: 1", "hooks.example", "/X-Evil:%201"),
        ("https://a\\@127.0.0.1/", "a", "/@127.0.0.1/"),
    ],
    ids=range(10),
)
def test_a_good_url_is_read_into_its_parts(url: str, netloc: str, path: str) -> None:
    target = OPEN.parse(url)
    assert (target.scheme, target.netloc, target.path, target.allowed) == ("https", netloc, path, False)
    OPEN.check(url)


INSIDE = [
    "127.0.0.1", "127.1", "0x7f.1", "0177.0.0.1", "2130706433", "①②⑦.0.0.1", "127.0.0.1.", "0", "0.0.0.0", "10.1.2.3",
    "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "0xa9fea9fe", "198.18.0.1", "192.0.2.1", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "[::]", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]",
    "[::ffff:0:7f00:1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]", "[2002:7f00:1::]",
    "[2002:a00:1::1]", "[2001:0:7f00:1::1]", "[2001:0:808:808:0:0:80ff:fffe]", "[fe80::1]", "[fc00::1]", "[fd12::1]",
    "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[100::1]", "localhost", "LOCALHOST", "localhost.", "a.localhost",
    "%6cocalhost", "192.0.0.192", "192.88.99.1", "168.63.129.16", "[::ffff:c000:c0]", "[3fff::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", INSIDE, ids=range(len(INSIDE)))
def test_a_host_inside_is_refused_by_its_form(host: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        OPEN.check(f"https://{host}/told?token=s3cret")
    (field,) = refused.value.errors
    assert field.loc == "webhook.url"
    assert "of an inner network" in field.msg
    assert "s3cret" not in str(refused.value)


WRONG = [
    "", "hooks.example", "//hooks.example/", "ftp://hooks.example/", "file:///etc/passwd", "http://hooks.example/",
    "https://", "https://user@hooks.example/", "https://:password@hooks.example/", "https://hooks.example:0/",
    "https://hooks.example:99999/", "https://ex ample/", "https://[fe80::1%25eth0]/", "https://1.2.3.4.5/",
    "https://./", "https://.../",
    "javascript:alert(1)", "https://\x00/", "gopher://hooks.example:70/_",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG, ids=range(len(WRONG)))
def test_what_is_no_https_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^webhook\.url: must be an https URL") as refused:
        OPEN.check(url)
    assert "password" not in str(refused.value) or "without user or password" in str(refused.value)


@given(st.text(max_size=40), st.sampled_from(["", "https://", "https://h.example:", "https://[", "https://0x"]))
def test_whatever_is_sent_is_read_or_refused(text: str, head: str) -> None:
    with contextlib.suppress(Refused):
        target = OPEN.parse(head + text)
        assert target.scheme == "https" and target.host and target.host.isascii() and target.path.isascii()
        assert not {"\r", "\n", " "} & set(target.netloc + target.path)
        assert target.address is None or public(target.address)


def test_what_the_operator_names_may_be_inside_and_http() -> None:
    targets = Targets(["localhost:9000", "10.0.0.7", "[::1]:80", "Hooks.Example", "bücher.example"])
    for url in (
        "http://localhost:9000/", "https://localhost:9000/", "http://10.0.0.7/", "https://10.0.0.7:1/", "http://[::1]/",
        "http://hooks.example:81/", "http://xn--bcher-kva.example/", "http://0xa.7/",
    ):  # fmt: skip
        assert targets.parse(url).allowed, url
    for url in ("http://localhost/", "https://localhost:9001/", "https://10.0.0.8/", "http://[::1]:81/"):
        with pytest.raises(Refused):
            targets.parse(url)
    assert not targets.parse("https://other.example/").allowed


@pytest.mark.parametrize("entry", ["a b", "http://x", "x/y", "::1", "[::1", "x:", "x:999999", "u@x"], ids=range(8))
def test_a_name_that_an_operator_mistyped_is_told(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="ZFLEET_WEBHOOK_ALLOW"):
        Targets([entry])


def names(*answers: list[str]) -> tuple[Targets, list[str]]:
    """Targets over a name server that gives one answer after the other; and what it was asked."""
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    return Targets(["allowed.example"], resolve), asked


def test_every_address_of_a_name_must_be_public() -> None:
    target = OPEN.parse("https://hooks.example/")
    good = ["8.8.8.8", "2606:4700::1111"]
    assert names(good)[0].addresses(target) == good
    for bad in ("127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::a00:1", "fe80::1%1", "2002:a9fe:a9fe::"):
        with pytest.raises(Refused, match="not public"):
            names([*good, bad])[0].addresses(target)


def test_a_name_is_asked_for_once_a_try() -> None:
    targets, asked = names(["8.8.8.8"], ["127.0.0.1"])
    target = targets.parse("https://hooks.example/")
    assert asked == []
    assert targets.addresses(target) == ["8.8.8.8"]
    assert asked == ["hooks.example"]
    with pytest.raises(Refused):
        targets.addresses(target)


def test_an_allowed_name_may_stand_for_anything_and_a_literal_asks_nobody() -> None:
    targets, asked = names(["127.0.0.1"])
    assert targets.addresses(targets.parse("http://allowed.example/")) == ["127.0.0.1"]
    assert targets.addresses(targets.parse("https://[2606:4700::1111]/")) == ["2606:4700::1111"]
    assert asked == ["allowed.example"]


def test_name_servers_that_do_not_answer_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.webhooks.targets.RESOLVE_S", 0.05)
    over = threading.Event()

    def resolve(_host: str, _port: int) -> list[str]:
        over.wait(5)
        return ["8.8.8.8"]

    began = time.monotonic()
    with pytest.raises(Refused, match="in time"):
        Targets(resolve=resolve).addresses(OPEN.parse("https://hooks.example/"))
    assert time.monotonic() - began < 3
    over.set()


@pytest.mark.parametrize("host", ["nobody.invalid", f"{'a' * 64}.example"])
def test_a_name_without_an_address_is_told(host: str) -> None:
    with pytest.raises(Refused, match="no address"):
        OPEN.addresses(Target("https", host, 443, "/", False))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_what_is_public_is_public(address: str) -> None:
    assert public(ipaddress.ip_address(address))
