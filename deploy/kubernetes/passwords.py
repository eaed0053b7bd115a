"""Prints the Secret `zfleet-redis` with fresh passwords: Redis' users, and each part's own URL. Standard library only.

    python deploy/kubernetes/passwords.py | kubectl apply -f -

Applied again it makes new ones; then everything has to be started anew, Redis first.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path

USERS = Path(__file__).parents[1] / "redis" / "users.py"
PARTS = ("gateway", "worker", "courier", "operator")
HOST = "zfleet-redis:6379"


def secret() -> dict[str, object]:
    """Return the Secret."""
    passwords = {part: secrets.token_hex(32) for part in PARTS}
    given = "".join(f"{part.upper()}_PASSWORD={password}\n" for part, password in passwords.items())
    command = [sys.executable, str(USERS), "--given"]
    users = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True).stdout
    urls = {f"{part}-url": f"redis://{part}:{password}@{HOST}/0" for part, password in passwords.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "zfleet-redis", "namespace": "zfleet", "labels": {"app.kubernetes.io/part-of": "zfleet"}},
        "type": "Opaque",
        "stringData": {"users.acl": users, **urls},
    }


if __name__ == "__main__":
    print(json.dumps(secret(), indent=1))
