"""The LoRA bench in its short form measures every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lora


def test_the_short_form_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert lora.main(["--quick", "--side", "64", "--out", str(tmp_path / "lora.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads((tmp_path / "lora.json").read_text("utf-8"))
    assert len(found["rows"]) == 10
    printed = capsys.readouterr().out
    for row in found["rows"]:
        assert row["value"] > 0, row
        assert row["measure"] in printed
    assert found["packages"]["peft"] and found["date"] and found["processor"] and found["gpu"] is None
    switch = next(row["value"] for row in found["rows"] if row["measure"] == "the switch alone")
    step = next(row["value"] for row in found["rows"] if row["measure"].startswith("a step without LoRA"))
    assert switch < step / 2, "switching must not go through all that is loaded"
