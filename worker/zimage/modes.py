"""Which modes a loaded checkpoint has."""

from __future__ import annotations

from typing import Any

from common.errors import PipelineFailed
from worker.pipelines.base import ImageRequest


def check_modes(model: str, parts: Any, request: ImageRequest) -> None:
    """Raise PipelineFailed, naming the remedy, for a request that the model of this name cannot carry out."""
    if request.mask_image is not None and request.init_image is None:
        raise PipelineFailed("a mask_image needs an init_image to paint over; send one")
    if request.control_image is not None:
        if parts.siglip is not None:
            raise PipelineFailed(
                f"model {model} edits pictures and takes no control_image; send it among reference_images"
            )
        if parts.controlnet is None:
            raise PipelineFailed(
                f"model {model} has no ControlNet for the control_image; choose a model with mode control, "
                "or name a ControlNet for this one in the models file (controlnet)"
            )
    if request.reference_images and parts.siglip is None:
        raise PipelineFailed(
            f"model {model} cannot read reference_images; choose a model with mode edit, "
            "whose checkpoint has a siglip folder"
        )
