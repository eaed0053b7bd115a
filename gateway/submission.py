"""From what a client asked for to what a worker carries out: defaults filled in, limits checked, the seed drawn."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from common import inputs
from common.errors import FieldError, InvalidRequest, UnknownModel
from common.limits import Limits
from common.models import Catalogue, ModelSpec
from common.schemas import PRIORITIES, SEED_MAX, GenerateRequest, Priority, ResolvedRequest
from gateway import modes, sizes
from gateway.inputs import Input

T = TypeVar("T")
Pictures = Mapping[str, Sequence[Input]]  # of a request, by field

LORAS_TOLD = 20  # in an answer; there may be thousands
LIKE = ("init_image", "control_image", "reference_images")  # whose size a picture has whose own is not given


def check(
    request: GenerateRequest,
    catalogue: Catalogue,
    priority_max: Priority = "high",
    wrong: Sequence[FieldError] = (),
) -> ModelSpec:
    """Return the model that is asked for, once what can be told without a look at the pictures is found right.

    Raises InvalidRequest with an entry for each field that the model's limits or the caller's key refuse, after those
    that are `wrong` already, and UnknownModel (which has the other entries too) when there is no such model.
    """
    errors = list(wrong)
    try:
        spec = catalogue[request.model] if request.model is not None else catalogue.default
    except UnknownModel as error:
        raise UnknownModel(error.message, errors=[*error.errors, *errors]) from None
    if PRIORITIES.index(priority(request, priority_max)) < PRIORITIES.index(priority_max):
        errors.append(_priority_error(priority_max))
    steps = spec.steps if request.steps is None else request.steps
    errors += sizes.errors(*sizes.chosen(request, spec), spec)
    if steps > spec.max_steps:
        errors.append(FieldError("steps", f"must be from 1 to {spec.max_steps} for model {spec.name}"))
    if request.n > spec.max_n:
        errors.append(FieldError("n", f"must be from 1 to {spec.max_n} for model {spec.name}"))
    elif request.seed is not None and request.seed + request.n - 1 > SEED_MAX:
        errors.append(FieldError("seed", f"must be from 0 to {SEED_MAX - request.n + 1} for {request.n} pictures"))
    errors += modes.errors(request, spec, catalogue)
    if request.reject_if_late and request.deadline_s is None:
        errors.append(FieldError("reject_if_late", "needs deadline_s, the seconds from now that the task has"))
    if inputs.steps_done(min(steps, spec.max_steps), modes.strength(request)) < 1:
        errors.append(FieldError("strength", f"leaves none of {steps} steps to do"))
    _refuse(errors)
    return spec


def resolve(
    request: GenerateRequest,
    spec: ModelSpec,
    pictures: Pictures = MappingProxyType({}),
    live: Limits = Limits(),  # noqa: B008 - a tuple
    priority_max: Priority = "high",
) -> ResolvedRequest:
    """Return a request that `check` found right for this model, with its prompt, with every value set.

    `pictures` are all of its own, and `live` is what workers can do. Raises InvalidRequest with an entry for each field
    that the workers' limits refuse, or that is wrong together with the pictures' sizes.
    """
    first = next((pictures[field][0] for field in LIKE if pictures.get(field)), None)
    like = None if first is None else (first.width, first.height)
    width, height = sizes.chosen(request, spec, like, live.max_pixels)
    _refuse([*sizes.errors(width, height, spec), *_live_errors(request, width * height, spec, live)])
    handles = {field: [picture.handle for picture in found] for field, found in pictures.items()}
    assert request.prompt is not None  # a template has set it
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        model=spec.name,
        width=width,
        height=height,
        steps=_or(request.steps, spec.steps),
        guidance_scale=_or(request.guidance_scale, spec.guidance_scale),
        cfg_normalization=_or(request.cfg_normalization, spec.cfg_normalization),
        cfg_truncation=_or(request.cfg_truncation, spec.cfg_truncation),
        init_image=next(iter(handles.get("init_image", ())), None),
        strength=modes.strength(request),
        mask_image=next(iter(handles.get("mask_image", ())), None),
        control_image=next(iter(handles.get("control_image", ())), None),
        control_scale=modes.control_scale(request),
        reference_images=tuple(handles.get("reference_images", ())),
        loras=tuple(request.loras),
        preview=request.preview,
        seed=secrets.randbelow(SEED_MAX - request.n + 2) if request.seed is None else request.seed,
        n=request.n,
        format=request.format,
        quality=request.quality,
        priority=priority(request, priority_max),
        template=request.template,
        deadline_s=request.deadline_s,
        webhook=request.webhook,
        metadata=request.metadata,
    )


def check_again(request: ResolvedRequest, catalogue: Catalogue, live: Limits, priority_max: Priority) -> None:
    """Raise what `check` and `resolve` would, for a request that was right when it was first submitted."""
    spec = catalogue[request.model]
    errors = sizes.errors(request.width, request.height, spec)
    if PRIORITIES.index(request.priority) < PRIORITIES.index(priority_max):
        errors.append(_priority_error(priority_max))
    if request.steps > spec.max_steps:
        errors.append(FieldError("steps", f"must be from 1 to {spec.max_steps} for model {spec.name}"))
    if request.n > spec.max_n:
        errors.append(FieldError("n", f"must be from 1 to {spec.max_n} for model {spec.name}"))
    _refuse([*errors, *_live_errors(request, request.width * request.height, spec, live)])


def _priority_error(priority_max: Priority) -> FieldError:
    allowed = PRIORITIES[PRIORITIES.index(priority_max) :]
    return FieldError("priority", f"must be {' or '.join(allowed)} with this API key")


def priority(request: GenerateRequest, highest: Priority) -> Priority:
    """Return the priority that is asked for, or, where none is, the default or the highest allowed if that is lower."""
    if "priority" in request.model_fields_set:
        return request.priority
    return max(request.priority, highest, key=PRIORITIES.index)


def _live_errors(
    request: GenerateRequest | ResolvedRequest, pixels: int, spec: ModelSpec, live: Limits
) -> list[FieldError]:
    """Return what no live worker can do, where they all say what they can."""
    errors = []
    if live.max_pixels == 0:
        errors.append(FieldError("model", f"no live worker has memory for any picture of model {spec.name}"))
    elif live.max_pixels is not None and pixels > live.max_pixels:
        most = f"width x height must be at most {live.max_pixels} pixels"
        errors.append(FieldError("width", f"{most}: no live worker of model {spec.name} has memory for more"))
    if live.loras is not None and (unknown := {lora.name for lora in request.loras} - live.loras):
        there = ", ".join(sorted(live.loras)[:LORAS_TOLD]) or "none (see ZFLEET_LORA_DIR)"
        there += ", … (see /api/models)" if len(live.loras) > LORAS_TOLD else ""
        errors.append(FieldError("loras", f"no live worker has {', '.join(sorted(unknown))}; there are: {there}"))
    return errors


def _refuse(errors: Sequence[FieldError]) -> None:
    if errors:
        raise InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in errors), errors=errors)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def body_hash(request: GenerateRequest, pictures: Pictures = MappingProxyType({})) -> str:
    """Return what two requests share exactly when they ask for the same: SHA-256 over canonical JSON.

    A picture counts by its file's bytes, however they were sent, and a handle as itself. Defaults are left out, so that
    two versions of this program, of which one knows more fields, agree.
    """
    body = request.model_dump(exclude_defaults=True)
    for field, found in pictures.items():
        body[field] = [picture.identity for picture in found]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def new_task_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_hex(16)
