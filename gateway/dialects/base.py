"""The dialect port. A dialect is a module of this folder with one function:

    def create(gateway: Gateway) -> Api

It returns a blueprint whose views parse what a client of that API sends into a GenerateRequest, hand it to
`gateway.tasks`, and render the TaskRecord that comes back. It keeps nothing and decides nothing: no Redis, no limits,
no file. A route that the gateway or another active dialect already has is a ConfigurationError at start.

What a dialect is made of, as `openai` shows:

    fields    models of what its clients send, and one function from each to a GenerateRequest
    answers   models of what they expect, and one function to each from a TaskRecord
    errors    raised as FleetErrors. `problems.install(api, render, under="/v1/")` gives them that API's own form, on
              its routes and at addresses that begin so; `Api(…, documented=…)` describes that form
    routes    `header: SubmitHeader` takes the Idempotency-Key; `outcome.wait_for` answers with the finished task,
              `tasks.follow` with all that happens to it; `links.url` makes URLs that need no key

A dialect that outgrows one file has more beside it whose names begin with `_`, which the registry leaves alone.
ZFLEET_DIALECTS names the active ones. `tests/contract/test_dialect.py` runs over every module found here, with an
example of its calls that has to be added there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from common.models import Catalogue
from gateway.api import Header
from gateway.images import Images
from gateway.inputs import Inputs
from gateway.links import Links
from gateway.tasks import Tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Gateway:
    """What a dialect may use."""

    tasks: Tasks
    images: Images
    pictures: Inputs
    links: Links
    catalogue: Catalogue
    aliases: Mapping[str, str]  # of models, for clients that know no other names


def _visible(key: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise ValueError("must be 1 to 255 visible ASCII characters")
    return key


class SubmitHeader(Header):
    """Headers of a submit."""

    idempotency_key: Annotated[str, AfterValidator(_visible)] | None = Field(
        None, alias="Idempotency-Key", description="The same key and body within 24 hours are one task."
    )
