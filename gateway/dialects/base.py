"""The dialect port. A dialect is a module of this folder with one function:

    def create(gateway: Gateway) -> Api

It returns a blueprint whose views parse what a client of that API sends into a GenerateRequest, hand it to
`gateway.tasks`, and render the TaskRecord that comes back. It keeps nothing and decides nothing: no Redis, no limits,
no file. Errors are raised as FleetErrors; `problems.install(blueprint, render)` gives them that API's own form. A
route that the gateway or another active dialect already has is a ConfigurationError at start.

ZFLEET_DIALECTS names the active ones. `tests/contract/test_dialect.py` runs over every module found here.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.models import Catalogue
from gateway.images import Images
from gateway.tasks import Tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Gateway:
    """What a dialect may use."""

    tasks: Tasks
    images: Images
    catalogue: Catalogue
