"""Each miniature is made and loaded once a module."""

from __future__ import annotations

import pytest

from tests.miniatures import PICO
from tests.unit.worker.zimage.driving import load
from tests.unit.worker.zimage.stock import Stock
from worker.pipelines.zimage import Pipeline


@pytest.fixture(scope="module")
def pipeline(one_thread: None) -> Pipeline:
    """The batched pipeline with pico."""
    return load(PICO)


@pytest.fixture(scope="module")
def stock(one_thread: None) -> Stock:
    """The stock pipelines with pico."""
    return Stock()
