"""The body of every error over HTTP: RFC 9457, as the gateway writes it and clients read it."""

from __future__ import annotations

from collections.abc import Sequence

from common.schemas import Wire


class ProblemField(Wire):
    """One refused field."""

    loc: str
    msg: str


class Problem(Wire):
    """Every error's body, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: Sequence[ProblemField] = ()
