"""What clients of OpenAI's image API send, and what it asks of the fleet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from common.errors import FieldError, InvalidRequest
from common.loras import LORAS_MAX, LoraChoice
from common.models import ModelSpec
from common.schemas import (
    METADATA_MAX_ENTRIES,
    REFERENCES_MAX,
    SEED_MAX,
    GenerateRequest,
    ImageFormat,
    MetadataKey,
    MetadataValue,
    Priority,
    Prompt,
    Webhook,
)
from gateway import bodies, fields
from gateway.bodies import FilePart, Parts
from gateway.dialects.base import Gateway

MAX_PARTS = 48  # of a form: OpenAI's fields, ours, and the pictures
SIZE = r"(?:[1-9][0-9]{1,4}x[1-9][0-9]{1,4}|auto)"
QUALITIES = ("low", "medium", "high", "xhigh", "max")

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]

_OURS = (
    "negative_prompt", "seed", "steps", "guidance_scale", "priority", "deadline_s", "reject_if_late", "webhook",
    "strength", "loras",
)  # fmt: skip
_OBJECTS = ("webhook", "metadata")  # in a form: `webhook[url]`, or JSON
_IN_BRACKETS = re.compile(r"([a-z_]{1,32})(?:\[([^\[\]]{1,64})\])?(\[\])?")


def _is_size(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(SIZE, text):
        raise ValueError("must be WIDTHxHEIGHT in pixels, as 1024x1024, or auto")
    return text


def _without_null(schema: dict[str, Any]) -> None:
    """Take `null` out of a model's schema: a form has none."""
    for field in schema["properties"].values():
        if kinds := [kind for kind in field.pop("anyOf", ()) if kind != {"type": "null"}]:
            field.update(kinds[0])
        if field.get("default", ...) is None:
            del field["default"]


Size = Annotated[str | None, AfterValidator(_is_size), Field(json_schema_extra={"pattern": f"^{SIZE}$"})]


class Asked(BaseModel):
    """What generations and edits share. Fields that neither OpenAI's clients nor this fleet need are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())

    prompt: Prompt = Field(min_length=1, description="What to paint, in any language.", examples=["a red circle"])
    model: str | None = Field(None, max_length=128, description="A model or alias of /v1/models; the fleet's default.")
    n: int | None = Field(1, ge=1, le=10, description="Pictures, within the model's limit; 1 with `stream`.")
    size: Size = Field("auto", description="WIDTHxHEIGHT, or auto: the model's, or that of the picture to edit.")
    quality: Quality | None = Field("auto", description="Taken, and handed back; `steps` is what changes anything.")
    output_format: ImageFormat | None = "png"
    output_compression: int | None = Field(
        100, ge=0, le=100, description="The quality of jpeg and webp; png has none to lose."
    )
    background: Literal["auto", "opaque"] | None = Field("auto", description="Pictures are opaque.")
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="`url`: links that work without a key for an hour."
    )
    stream: bool | None = Field(False, description="Whether to answer with server-sent events.")
    partial_images: int | None = Field(
        0, ge=0, le=3, description="With `stream`: at most so many small pictures on the way."
    )
    user: str | None = Field(None, max_length=512, description="Kept in the task's metadata.")
    safety_identifier: str | None = Field(None, max_length=512, description="Goes before `user`.")

    negative_prompt: Prompt | None = None
    seed: int | None = Field(None, ge=0, le=SEED_MAX)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=20, allow_inf_nan=False)
    priority: Priority | None = Field(None, description="`normal`, or lower if the key allows no more.")
    deadline_s: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)
    reject_if_late: bool | None = False
    webhook: Webhook | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=METADATA_MAX_ENTRIES)

    @property
    def shown_quality(self) -> str:
        """What an answer says of `quality`: OpenAI's answers name a degree, and never `auto`."""
        return self.quality if self.quality in QUALITIES else "high"


class ImageGeneration(Asked):
    """POST /v1/images/generations. The fields from `negative_prompt` on are zfleet's own, as in POST /api/submit.

    OpenAI's that mean nothing here (`moderation`, `style`, `complexity` …) are ignored, and so are unknown ones.
    """

    loras: list[LoraChoice] | None = Field(None, max_length=LORAS_MAX)


class ImageEdit(Asked):
    """POST /v1/images/edits. A part may also be called `image[]`; an object's fields are parts like `webhook[url]`.

    OpenAI's fields that mean nothing here (`input_fidelity`, `moderation` …) are ignored, and so are unknown ones.
    """

    model_config = ConfigDict(strict=False, json_schema_extra=_without_null)  # a form has only texts

    image: list[FilePart] = Field(
        min_length=1, max_length=REFERENCES_MAX, description="PNG, JPEG or WebP files; one, if there is a mask."
    )
    mask: FilePart | None = Field(
        None, description="A PNG or WebP file that is transparent where `image` is painted over."
    )
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)


def read_edit(parts: Parts) -> ImageEdit:
    """Return a form; raises InvalidRequest, also where a file comes as a text or the other way round."""
    texts, files = parts
    errors = [FieldError(name.strip("[]"), "must be a file") for name in ("image", "image[]", "mask") if name in texts]
    values: dict[str, Any] = {}
    for key, several in texts.lists():
        if match := _IN_BRACKETS.fullmatch(key):
            errors += _put(values, match, several)
    values["image"] = [file.stream.read() for name in ("image", "image[]") for file in files.getlist(name)]
    masks = files.getlist("mask")
    if len(masks) > 1:
        errors.append(FieldError("mask", "must be given once"))
    if not values["image"] and not errors:
        errors.append(FieldError("image", "is required: a file to edit"))
    if errors:
        raise InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in errors), errors=errors)
    return fields.read(ImageEdit, values | ({"mask": masks[0].stream.read()} if masks else {}))


def generation(asked: ImageGeneration, gateway: Gateway) -> GenerateRequest:
    """Return what the fleet is asked for; raises InvalidRequest and UnknownModel."""
    return _native(asked, _spec(asked, gateway), {})


def edit(asked: ImageEdit, gateway: Gateway) -> tuple[GenerateRequest, Mapping[str, bytes]]:
    """Return what the fleet is asked for, and its files by the names that they have there.

    With a mask it paints inside that; without, the pictures are references where the model edits, else the one
    picture is what it starts from. Raises InvalidRequest and UnknownModel.
    """
    spec = _spec(asked, gateway)
    files = {bodies.digest(data): data for data in asked.image}
    names = [bodies.digest(data) for data in asked.image]
    if asked.mask is not None:
        if len(names) > 1:
            raise InvalidRequest.field("image", "must be one file where there is a mask")
        mask = gateway.pictures.mask_of_holes(asked.mask, field="mask")
        files[bodies.digest(mask)] = mask
        pictures: dict[str, Any] = {"init_image": names[0], "mask_image": bodies.digest(mask)}
    elif "edit" in spec.modes or len(names) > 1:
        pictures = {"reference_images": names}
    else:
        pictures = {"init_image": names[0]}
    return _native(asked, spec, pictures), files


def _spec(asked: Asked, gateway: Gateway) -> ModelSpec:
    if asked.model is None:
        return gateway.catalogue.default
    return gateway.catalogue[gateway.aliases.get(asked.model, asked.model)]


def _native(asked: Asked, spec: ModelSpec, pictures: Mapping[str, Any]) -> GenerateRequest:
    values = {name: value for name in _OURS if (value := getattr(asked, name, None)) is not None}
    values |= {"prompt": asked.prompt, "model": spec.name, "n": asked.n or 1, **pictures}
    if asked.size not in (None, "auto"):
        values["width"], values["height"] = map(int, str(asked.size).split("x"))
    values["format"] = asked.output_format or "png"
    values["quality"] = max(1, 100 if asked.output_compression is None else asked.output_compression)
    values["preview"] = bool(asked.stream and asked.partial_images)
    user = asked.safety_identifier or asked.user
    values["metadata"] = {**(asked.metadata or {}), **({"user": user} if user else {})}
    if asked.stream and values["n"] > 1:
        raise InvalidRequest.field("n", "must be 1 with stream: its events do not tell pictures apart")
    if asked.stream and asked.response_format == "url":
        raise InvalidRequest.field("response_format", "must be b64_json with stream, whose events have no URL")
    return fields.read(GenerateRequest, values)


def _put(values: dict[str, Any], match: re.Match[str], several: list[str]) -> list[FieldError]:
    """Put a part's texts where they belong, as `n`, `webhook[url]`, `webhook[events][]`; return what is wrong."""
    name, inner, is_list = match[1], match[2], bool(match[3])
    if len(several) > 1 and not is_list:
        return [FieldError(match[0], "must be given once")]
    value: Any = several if is_list else several[0]
    if inner is not None:
        within = values.setdefault(name, {})
        if isinstance(within, dict):
            within[inner] = value
        return []
    if name in _OBJECTS and not is_list:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [FieldError(name, f"must be JSON, or parts like {name}[…]")]
    values[name] = value
    return []
