"""What a picture may be made from, beside a prompt: which fields go together, and with which models."""

from __future__ import annotations

from common import inputs
from common.errors import FieldError
from common.models import Catalogue, Mode, ModelSpec
from common.schemas import GenerateRequest

STRENGTH = 0.6
STRENGTH_WITH_MASK = 1.0
CONTROL_SCALE = 0.75

_NEEDS: dict[str, tuple[Mode, str]] = {  # by field
    "init_image": ("image", "start from a picture"),
    "mask_image": ("inpaint", "paint inside a mask"),
    "control_image": ("control", "follow a control image"),
    "reference_images": ("edit", "edit pictures"),
}
_ONLY_WITH = {"mask_image": "init_image", "strength": "init_image", "control_scale": "control_image"}
_NEVER_WITH = {  # the model's authors have no pipeline for these
    "control_image": ("init_image", "mask_image"),
    "reference_images": ("init_image", "mask_image", "control_image"),
}


def errors(request: GenerateRequest, spec: ModelSpec, catalogue: Catalogue) -> list[FieldError]:
    """Return what is wrong with the request's pictures and LoRAs as far as can be told without a look at them."""
    given = {field for field in (*inputs.FIELDS, *_ONLY_WITH) if getattr(request, field) not in (None, [])}
    found = []
    for field, (mode, what) in _NEEDS.items():
        if field in given and mode not in spec.modes:
            able = ", ".join(other.name for other in catalogue.values() if mode in other.modes) or "none here"
            found.append(FieldError(field, f"model {spec.name} cannot {what}; models that can: {able}"))
    for field, other in _ONLY_WITH.items():
        if field in given and other not in given:
            found.append(FieldError(field, f"needs {other}"))
    for field, others in _NEVER_WITH.items():
        if field in given and (clash := [other for other in others if other in given]):
            found.append(FieldError(field, f"does not go together with {', '.join(clash)}"))
    names = [lora.name for lora in request.loras]
    if names and not spec.takes_loras:
        able = ", ".join(other.name for other in catalogue.values() if other.takes_loras) or "none here"
        found.append(FieldError("loras", f"model {spec.name} takes none; models that do: {able}"))
    elif len(set(names)) < len(names):
        found.append(FieldError("loras", "names must differ"))
    return found


def strength(request: GenerateRequest) -> float:
    """Return how much of the picture is painted over; all of it where there is none."""
    if request.init_image is None:
        return 1.0
    if request.strength is not None:
        return request.strength
    return STRENGTH if request.mask_image is None else STRENGTH_WITH_MASK


def control_scale(request: GenerateRequest) -> float:
    """Return how much the ControlNet counts."""
    if request.control_image is None:
        return 0.0
    return CONTROL_SCALE if request.control_scale is None else request.control_scale
