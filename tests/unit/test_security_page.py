"""docs/security.md names tests that there are, and leaves none of OWASP's ten out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")
NAMED = re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", PAGE)


def test_it_names_many_tests() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)), ids=lambda value: str(value))
def test_each_named_test_exists(file: str, test: str) -> None:
    path = ROOT / "tests" / file
    assert path.is_file(), f"docs/security.md names tests/{file}"
    assert re.search(rf"^(?:async )?def {test}\(", path.read_text("utf-8"), re.MULTILINE), f"{file} has no {test}"


def test_no_row_goes_without() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| risk", "| threat"))]
    assert not [row for row in rows if "`" not in row.split("|")[3]]


@pytest.mark.parametrize("number", range(1, 11))
def test_each_of_owasps_ten_has_its_row(number: int) -> None:
    assert re.search(rf"^\| API{number}:2023 ", PAGE, re.MULTILINE)
