"""`zfleet keys` on a real Redis."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta

import pytest

from common.apikeys import ApiKey, Token, proves
from common.broker import Broker
from common.settings import Settings
from tests.servers import free_port
from tests.unit.zfleet.test_cli import one_line
from zfleet import cli

CREATE = ["keys", "create", "--tenant", "acme"]
NOT_ACTIVE = "is (retiring|revoked|expired) already"


@pytest.fixture(autouse=True)
def _this_redis(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    for name in list(os.environ):
        if name.startswith("ZFLEET_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ZFLEET_REDIS_URL", settings.redis_url)


Run = pytest.CaptureFixture[str]


def ran(capsys: Run, *line: str) -> tuple[str, str]:
    assert cli.main(line) == 0
    return capsys.readouterr()


def created(capsys: Run, *flags: str) -> Token:
    token = Token.parse(ran(capsys, *CREATE, *flags)[0].removesuffix("\n"))
    assert token is not None
    return token


def stored(broker: Broker, token: Token) -> ApiKey:
    key = broker.key(token.key_id)
    assert key is not None
    return key


def listed(capsys: Run) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(ran(capsys, "keys", "list", "--json")[0])
    return rows


def test_create_prints_the_key_alone_and_once(capsys: Run, broker: Broker) -> None:
    out, err = ran(capsys, *CREATE)
    token = Token.parse(out.removesuffix("\n"))
    assert token is not None
    assert proves(token, broker.key(token.key_id))
    assert token.secret not in err
    assert "shown this once" in err
    assert "the first one here" in err
    assert "the first one here" not in ran(capsys, *CREATE)[1]
    for line in (["keys", "list"], ["keys", "list", "--json"], ["keys", "revoke", token.key_id]):
        out, err = ran(capsys, *line)
        assert token.secret not in out + err
        assert token.digest not in out + err


def test_alone_it_shows_its_help(capsys: Run) -> None:
    assert "rotate" in ran(capsys, "keys")[0]


def test_limits_are_the_keys_and_the_share_the_tenants(capsys: Run, broker: Broker) -> None:
    flags = "--priority-max normal --rate 10/s --max-queued 100 --max-running 8 --share 2.5 --expires 90d --admin"
    key = stored(broker, created(capsys, *flags.split()))
    limits = (key.tenant, key.priority_max, key.rate, key.max_queued, key.max_running, key.admin)
    assert limits == ("acme", "normal", "10/s", 100, 8, True)
    assert key.expires_at is not None
    assert key.expires_at - key.created_at == timedelta(days=90)
    plain = stored(broker, created(capsys))
    assert plain == ApiKey(key_id=plain.key_id, tenant="acme", digest=plain.digest, created_at=plain.created_at)
    assert broker.shares() == {"acme": 2.5}, "one that says nothing changes nothing"
    created(capsys, "--share", "1")
    assert broker.shares() == {"acme": 1.0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("create", "--tenant"),
        ("create --tenant Acme", "--tenant': 'Acme' is not 1 to 32 of a-z, 0-9 and -"),
        ("create --tenant a.b", "--tenant"),
        ("create --tenant -a", "--tenant"),
        ("create --tenant *", "--tenant"),
        (f"create --tenant {'a' * 33}", "--tenant"),
        ("create --tenant a --rate 10", "--rate': '10' is no rate; write 10/s"),
        ("create --tenant a --rate 0/s", "--rate"),
        ("create --tenant a --rate 1/w", "--rate"),
        ("create --tenant a --rate 1.5/s", "--rate"),
        ("create --tenant a --max-queued 0", "--max-queued"),
        ("create --tenant a --max-running many", "--max-running"),
        ("create --tenant a --share 0", "--share': 0 is not from 0.01 to 100"),
        ("create --tenant a --share nan", "--share': nan is not from"),
        ("create --tenant a --share -1", "--share"),
        ("create --tenant a --expires 90", "--expires': '90' is no time; write 90d"),
        ("create --tenant a --expires 0d", "--expires"),
        ("create --tenant a --priority-max urgent", "--priority-max"),
        ("create --tenant a b", "extra argument"),
        ("make", "No such command 'make'"),
        ("list --yaml", "--yaml"),
        ("revoke", "ID"),
        ("revoke 0123456789ab", "no key has this id; `zfleet keys list`"),
        ("revoke x", "ID': that is no key's id"),
        ("rotate 0123456789ab", "no key has this id"),
        ("rotate 0123456789ab --grace 1", "--grace"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line: str, says: str, capsys: Run, broker: Broker) -> None:
    assert cli.main(["keys", *line.split()]) == 2
    assert says in one_line(capsys)
    assert broker.all_keys() == []


def test_a_whole_key_in_place_of_its_id_is_not_repeated(capsys: Run) -> None:
    token = created(capsys)
    for command in ("revoke", "rotate"):
        assert cli.main(["keys", command, str(token)]) == 2
        assert token.secret not in one_line(capsys)


def test_list_shows_all_but_secrets(capsys: Run) -> None:
    assert ran(capsys, "keys", "list")[0].split() == [
        *["ID", "TENANT", "STATE", "SCOPE", "PRIORITY", "RATE", "QUEUED", "RUNNING", "SHARE", "CREATED", "ENDS"]
    ]
    assert listed(capsys) == []
    first = created(capsys, "--rate", "5/m", "--share", "3", "--expires", "1h", "--max-queued", "7")
    other = Token.parse(ran(capsys, "keys", "create", "--tenant", "beta", "--admin")[0].strip())
    assert other is not None
    ran(capsys, "keys", "revoke", other.key_id)
    rows = listed(capsys)
    told = {"key_id": first.key_id, "tenant": "acme", "state": "active", "share": 3.0, "rate": "5/m", "max_queued": 7}
    assert told.items() <= rows[0].items()
    assert {"tenant": "beta", "state": "revoked", "share": 1.0, "admin": True, "expires_at": None}.items() <= rows[
        1
    ].items()
    lines = ran(capsys, "keys", "list")[0].splitlines()
    assert re.match(rf"{first.key_id} +acme +active +tenant +high +5/m +7 +- +3 +20\d\d", lines[1]), lines[1]
    assert re.match(rf"{other.key_id} +beta +revoked +admin", lines[2])


def test_revoke_is_for_good(capsys: Run, broker: Broker) -> None:
    token = created(capsys)
    assert "is revoked" in ran(capsys, "keys", "revoke", token.key_id)[0]
    key = stored(broker, token)
    assert not proves(token, key)
    ran(capsys, "keys", "revoke", token.key_id)
    assert stored(broker, token) == key, "the first time counts"


def test_rotate_makes_another_key_with_the_same_limits(capsys: Run, broker: Broker) -> None:
    old = created(capsys, "--rate", "2/s", "--max-running", "3", "--expires", "30d", "--priority-max", "low", "--admin")
    out, err = ran(capsys, "keys", "rotate", old.key_id)
    new = Token.parse(out.strip())
    assert new is not None
    assert not proves(old, broker.key(old.key_id))
    assert proves(new, broker.key(new.key_id))
    before, after = stored(broker, old), stored(broker, new)
    own = {"key_id", "digest", "created_at", "expires_at", "revoked_at"}
    assert after.model_dump(exclude=own) == before.model_dump(exclude=own)
    assert after.expires_at is not None
    assert after.expires_at - after.created_at == timedelta(days=30)
    assert f"the key {old.key_id} that it replaces is revoked" in err


def test_with_a_grace_both_work_for_a_while(capsys: Run, broker: Broker) -> None:
    old = created(capsys)
    out, err = ran(capsys, "keys", "rotate", old.key_id, "--grace", "1h")
    new = Token.parse(out.strip())
    assert new is not None
    assert all(proves(token, broker.key(token.key_id)) for token in (old, new))
    assert "works until" in err
    key = stored(broker, old)
    assert key.state(datetime.now(UTC)) == "retiring"
    assert not key.works(datetime.now(UTC) + timedelta(hours=1))
    assert cli.main(["keys", "rotate", old.key_id]) == 2
    assert re.search(NOT_ACTIVE, one_line(capsys))
    ran(capsys, "keys", "revoke", old.key_id)
    assert not proves(old, broker.key(old.key_id)), "sooner than the grace"
    assert len(broker.all_keys()) == 2


def test_without_redis_that_is_said(capsys: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFLEET_REDIS_URL", f"redis://:secret@127.0.0.1:{free_port()}/0")
    monkeypatch.setenv("ZFLEET_REDIS_PATIENCE_S", "0.1")
    for line in (CREATE, ["keys", "list"], ["keys", "revoke", "0123456789ab"], ["keys", "rotate", "0123456789ab"]):
        assert cli.main(line) == 1
        said = one_line(capsys)
        assert "Redis did not answer" in said
        assert "(ZFLEET_REDIS_URL is redis://:***@127.0.0.1:" in said
