"""A model that is asked for a mode it has not says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import PipelineFailed
from tests.miniatures import omni_checkpoint
from tests.unit.worker.zimage.driving import ask, load, masked, painted
from worker.pipelines.zimage import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ({"control_image": painted(1)}, "model pico has no ControlNet .* choose a model with mode control"),
        ({"reference_images": (painted(1),)}, "model pico cannot read reference_images; choose a model with mode edit"),
        ({"mask_image": masked(1)}, "a mask_image needs an init_image"),
    ],
)
def test_pico_has_no_controlnet_and_no_siglip(pipeline: Pipeline, asked: dict[str, Any], remedy: str) -> None:
    with pytest.raises(PipelineFailed, match=remedy):
        pipeline.start(ask(**asked))


def test_a_model_that_edits_takes_no_control(tmp_path: Path) -> None:
    omni = load(omni_checkpoint(tmp_path / "omni"))
    with pytest.raises(PipelineFailed, match="model omni edits pictures and takes no control_image"):
        omni.start(ask(control_image=painted(1), control_scale=0.5))
