"""Print users.acl with the digests of the users' passwords. Standard library only.

    python3 deploy/redis/users.py > made.acl              # makes the passwords, and tells them on standard error, once
    python3 deploy/redis/users.py --given < passwords     # lines as GATEWAY_PASSWORD=…; others are left out of account

No password is on a command line, where `ps` would show it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

USERS = Path(__file__).with_name("users.acl")
MISSING = re.compile(r"\b([A-Z]+)_PASSWORD_SHA256\b")
GIVEN = re.compile(r"^([A-Z]+)_PASSWORD=(.+)$", re.MULTILINE)
PLAIN = re.compile(r"[A-Za-z0-9._~-]+")  # a URL has it as it is, and whatever reads such lines takes nothing off it


def filled(passwords: Mapping[str, str]) -> str:
    """Return the file with the digests of these passwords, by user; raises SystemExit for none, or an odd one."""
    acl = USERS.read_text("utf-8")
    if lacking := set(MISSING.findall(acl)) - passwords.keys():
        sys.exit(f"{sys.argv[0]}: there is no {min(lacking)}_PASSWORD")
    if odd := [user for user, password in passwords.items() if not PLAIN.fullmatch(password)]:
        sys.exit(f"{sys.argv[0]}: {min(odd)}_PASSWORD may have A-Z a-z 0-9 . _ ~ - alone: no quotes, spaces, @ or $")
    return MISSING.sub(lambda user: hashlib.sha256(passwords[user[1]].encode()).hexdigest(), acl)


def main(argv: Sequence[str]) -> None:
    """Print the file."""
    if list(argv) == ["--given"]:
        print(filled(dict(GIVEN.findall(sys.stdin.read()))), end="")
    elif argv:
        sys.exit(__doc__)
    else:
        made = {user: secrets.token_hex(32) for user in dict.fromkeys(MISSING.findall(USERS.read_text("utf-8")))}
        for user, password in made.items():
            print(f"{user.lower()}: {password}", file=sys.stderr)
        print(filled(made), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
