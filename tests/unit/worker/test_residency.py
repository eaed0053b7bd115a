"""Which models a worker serves when not all of them can be."""

from __future__ import annotations

import pytest

from common.errors import ModelLoadFailed, OutOfMemory
from common.models import Catalogue, ModelSpec
from worker.pipelines import simulated
from worker.residency import Residency


def catalogue(*names: str) -> Catalogue:
    return Catalogue([ModelSpec(name=name, source="builtin", pipeline="simulated") for name in names])


@pytest.fixture
def fail_to_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model called `bad` is out of memory at its first picture."""

    def warm(pipeline: simulated.Pipeline) -> None:
        if pipeline.spec.name == "bad":
            raise OutOfMemory("no memory left")

    monkeypatch.setattr(simulated.Pipeline, "warm", warm)


@pytest.mark.usefixtures("fail_to_warm")
def test_a_model_that_cannot_make_one_picture_is_left_out() -> None:
    residency = Residency(catalogue("bad", "good"), device="cpu")
    residency.prewarm()
    assert residency.loaded == ("good",)


@pytest.mark.usefixtures("fail_to_warm")
def test_with_no_model_left_there_is_no_worker() -> None:
    with pytest.raises(ModelLoadFailed, match="bad from builtin cannot be loaded: no memory left"):
        Residency(catalogue("bad"), device="cpu").prewarm()
