"""The short form of `make fuzz`: every operation that /openapi.json describes, fuzzed by schemathesis."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.run import fuzz

CASES = 400


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, cases=CASES, seed=1)
    assert not outcome.problems, str(outcome)
    assert outcome.cases >= CASES
    assert outcome.statuses.keys() >= {200, 201, 202, 401, 404, 405, 422}, "the cases went nowhere"
