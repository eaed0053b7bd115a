"""Prints the Secret `zfleet-redis` with fresh passwords: Redis' users, and each part's own URL. Standard library only.

    python deploy/kubernetes/passwords.py | kubectl apply -f -

Applied again it makes new ones; then everything has to be started anew, Redis first.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

USERS = Path(__file__).parents[1] / "redis" / "users.acl"
PARTS = ("gateway", "worker", "courier", "operator")
HOST = "zfleet-redis:6379"


def secret() -> dict[str, object]:
    """Return the Secret."""
    users, urls = USERS.read_text("utf-8"), {}
    for part in PARTS:
        password = secrets.token_hex(32)
        users = users.replace(f"{part.upper()}_PASSWORD_SHA256", hashlib.sha256(password.encode()).hexdigest())
        urls[f"{part}-url"] = f"redis://{part}:{password}@{HOST}/0"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "zfleet-redis", "namespace": "zfleet", "labels": {"app.kubernetes.io/part-of": "zfleet"}},
        "type": "Opaque",
        "stringData": {"users.acl": users, **urls},
    }


if __name__ == "__main__":
    print(json.dumps(secret(), indent=1))
