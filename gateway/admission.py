"""Who is asking. Keys and quotas will be decided here; until then everybody is one tenant."""

from __future__ import annotations

DEFAULT_TENANT = "default"


def tenant() -> str:
    """Return the tenant of the current request; the only place that knows."""
    return DEFAULT_TENANT
