"""From what a client asked for to what a worker carries out: defaults filled in, limits checked, the seed drawn."""

from __future__ import annotations

import hashlib
import json
import secrets

from common.errors import FieldError, InvalidRequest, UnknownModel
from common.models import SIZE_MULTIPLE, Catalogue, ModelSpec
from common.schemas import SEED_MAX, GenerateRequest, ResolvedRequest


def resolve(request: GenerateRequest, catalogue: Catalogue) -> ResolvedRequest:
    """Return the request with every value set.

    Raises InvalidRequest with an entry for each field that the model's limits refuse, and UnknownModel (which has the
    other entries too) when there is no such model.
    """
    errors: list[FieldError] = []
    if request.template is not None:
        errors.append(FieldError("template", "is not installed here; leave it out, or see /api/templates"))
    try:
        spec = catalogue[request.model] if request.model is not None else catalogue.default
    except UnknownModel as error:
        raise UnknownModel(error.message, errors=[*error.errors, *errors]) from None
    width = spec.width if request.width is None else request.width
    height = spec.height if request.height is None else request.height
    steps = spec.steps if request.steps is None else request.steps
    errors += _size_errors(width, height, spec)
    if steps > spec.max_steps:
        errors.append(FieldError("steps", f"must be from 1 to {spec.max_steps} for model {spec.name}"))
    if request.n > spec.max_n:
        errors.append(FieldError("n", f"must be from 1 to {spec.max_n} for model {spec.name}"))
    elif request.seed is not None and request.seed + request.n - 1 > SEED_MAX:
        errors.append(FieldError("seed", f"must be from 0 to {SEED_MAX - request.n + 1} for {request.n} pictures"))
    if len({lora.name for lora in request.loras}) < len(request.loras):
        errors.append(FieldError("loras", "names must differ"))
    if errors:
        raise InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in errors), errors=errors)
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        model=spec.name,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=spec.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        preview=request.preview,
        seed=secrets.randbelow(SEED_MAX - request.n + 2) if request.seed is None else request.seed,
        n=request.n,
        format=request.format,
        quality=request.quality,
        priority=request.priority,
        deadline_s=request.deadline_s,
        metadata=request.metadata,
    )


def _size_errors(width: int, height: int, spec: ModelSpec) -> list[FieldError]:
    """Return what is wrong with the picture's size in pixels, if anything."""
    wanted = f"must be a multiple of {SIZE_MULTIPLE} from {spec.min_side} to {spec.max_side} for model {spec.name}"
    errors = [
        FieldError(name, wanted)
        for name, side in (("width", width), ("height", height))
        if side % SIZE_MULTIPLE or not spec.min_side <= side <= spec.max_side
    ]
    if not errors and width * height > spec.max_pixels:
        errors.append(FieldError("width", f"width x height must be at most {spec.max_pixels} pixels for {spec.name}"))
    return errors


def body_hash(request: GenerateRequest) -> str:
    """Return what two requests share exactly when they ask for the same: SHA-256 over canonical JSON."""
    canonical = json.dumps(request.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def new_task_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_hex(16)
