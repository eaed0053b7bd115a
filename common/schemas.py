"""Frozen wire models: what travels over HTTP, and what a task's record on Redis reads back as."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from common.loras import LORAS_MAX, LoraChoice

PROMPT_MAX_CHARS = 16_000
SEED_MAX = 2**53 - 1  # the largest integer that every JSON client reads back unchanged
METADATA_MAX_ENTRIES = 16
PICTURES_JSON_MAX_BYTES = 32 * 1024 * 1024  # of a body with pictures in base64; a form is better for larger ones
REFERENCES_MAX = 4  # pictures that an edit may look at
VALUES_MAX_ENTRIES = 16  # placeholders of a prompt template
VALUE_MAX_CHARS = 1_000

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")  # served in this order
ImageFormat = Literal["webp", "png", "jpeg"]
WebhookEvent = Literal["started", "ended"]
Outcome = Literal["running", "succeeded", "failed", "canceled", "released", "crashed", "lost"]


class TaskStatus(enum.StrEnum):
    """Where a task stands. A task reaches exactly one of the final states, once."""

    QUEUED = "queued"  # accepted, waits for a worker
    RUNNING = "running"  # a worker holds its lease
    SUCCEEDED = "succeeded"  # its images can be fetched
    FAILED = "failed"  # `error` says why
    CANCELED = "canceled"  # stopped by its owner
    EXPIRED = "expired"  # its deadline passed before it began

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (TaskStatus.QUEUED, TaskStatus.RUNNING)


class Wire(BaseModel):
    """Base of all wire models: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Stored(Wire):
    """Base of what is kept on Redis: one version writes it and another may read it, so an unknown field is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


def _readable(text: str | None) -> str | None:
    """Refuse what no tokenizer should see; pydantic itself refuses lone surrogates."""
    if text is not None:
        if "\x00" in text:
            raise ValueError("must not contain NUL characters")
        if "\ufffd" in text:
            raise ValueError("contains U+FFFD, the mark of badly decoded text; send the prompt as UTF-8")
    return text


def _never_null(field: dict[str, Any]) -> None:
    """Describe a field that may be left out as what it is where it is given."""
    field |= field.pop("anyOf")[0]
    del field["default"]


Prompt = Annotated[str, StringConstraints(max_length=PROMPT_MAX_CHARS)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
PlaceholderName = Annotated[str, StringConstraints(min_length=1, max_length=32)]
PlaceholderValue = Annotated[str, StringConstraints(max_length=VALUE_MAX_CHARS), AfterValidator(_readable)]


# A handle of POST /api/images, or a picture itself: base64 of a PNG, JPEG or WebP file, or a data: URL of one
Picture = Annotated[str, StringConstraints(min_length=1, max_length=PICTURES_JSON_MAX_BYTES)]


class Webhook(Wire):
    """Where to tell of a task's changes, and of which."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    url: str = Field(min_length=1, max_length=2048, description="An https address that the whole world can reach.")
    events: list[WebhookEvent] = Field(
        default=["ended"], min_length=1, max_length=2, description="`ended`: its final state; `started`: each attempt."
    )


class Delivery(Stored):
    """One thing that a webhook is told, and how that went."""

    id: str = Field(description="The `webhook-id` that every try carries.")
    event: WebhookEvent
    state: Literal["pending", "delivered", "failed"]
    tries: int = Field(description="Begun so far.")
    last_status: int | None = Field(default=None, description="HTTP status of the last answer; null: none came.")
    last_error: str | None = Field(default=None, description="Why the last try failed.")
    last_try_at: datetime | None = None
    next_try_at: datetime | None = Field(default=None, description="Null while a try is under way, and at the end.")


class WebhookView(Wire):
    """What has been told about a task, and what is still to be told."""

    url: str
    deliveries: Sequence[Delivery]


class GenerateRequest(Wire):
    """What a client asks for. Every field but the prompt may be left to the model's defaults, that to a template."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["template"]}]},
    )

    template: str | None = Field(default=None, max_length=64, description="A prompt template of /api/templates.")
    values: dict[PlaceholderName, PlaceholderValue] = Field(
        default_factory=dict, max_length=VALUES_MAX_ENTRIES, description="What stands for the template's placeholders."
    )
    prompt: Prompt | None = Field(
        default=None,
        validate_default=True,
        min_length=1,
        description="What to paint, in any language; what stands for {prompt} in a template that has that.",
        examples=["a red circle"],
        json_schema_extra=_never_null,
    )
    negative_prompt: Prompt | None = Field(default=None, description="What to keep out; needs guidance_scale > 0.")
    model: str | None = Field(default=None, max_length=32, description="An alias of /api/models; the fleet's default.")
    width: int | None = Field(default=None, description="Pixels, a multiple of 16 within the model's limits.")
    height: int | None = Field(default=None, description="Pixels, a multiple of 16 within the model's limits.")
    steps: int | None = Field(default=None, ge=1, description="Denoising steps, within the model's limit.")
    guidance_scale: float | None = Field(default=None, ge=0, le=20, allow_inf_nan=False)
    cfg_normalization: float | None = Field(
        default=None, ge=0, le=10, allow_inf_nan=False, description="How far guidance may lengthen a step; 0: freely."
    )
    cfg_truncation: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="Guidance ends once 1 - sigma is above this."
    )
    init_image: Picture | None = Field(default=None, description="The picture to start from; see /api/images.")
    strength: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, description="How much of init_image is painted over."
    )
    mask_image: Picture | None = Field(default=None, description="Where to paint over init_image: white.")
    control_image: Picture | None = Field(default=None, description="What the model's ControlNet looks at.")
    control_scale: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    reference_images: list[Picture] = Field(
        default_factory=list, max_length=REFERENCES_MAX, description="Pictures that the prompt says how to edit."
    )
    loras: list[LoraChoice] = Field(default_factory=list, max_length=LORAS_MAX)
    preview: bool = Field(default=False, description="Whether the status shows a small picture while it is painted.")
    seed: int | None = Field(default=None, ge=0, le=SEED_MAX, description="The same seed gives the same picture.")
    n: int = Field(default=1, ge=1, description="Pictures, with seeds seed, seed+1, …")
    format: ImageFormat = "webp"
    quality: int = Field(default=85, ge=1, le=100, description="For webp and jpeg.")
    priority: Priority = "normal"
    deadline_s: float | None = Field(default=None, gt=0, le=86_400, allow_inf_nan=False)
    reject_if_late: bool = Field(
        default=False, description="Whether to refuse it at once if the backlog lets it end after `deadline_s`."
    )
    webhook: Webhook | None = Field(default=None, description="An address that is told when the task has ended.")
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=METADATA_MAX_ENTRIES, description="Yours; handed back with the status."
    )

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _prompts_are_readable(cls, text: str | None) -> str | None:
        return _readable(text)

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None and info.data.get("template", ...) is None:
            raise PydanticKnownError("missing")
        if text is not None and not text.strip():
            raise ValueError("must not be blank")
        return text


class ResolvedRequest(Stored):
    """A request with every value set and checked against its model: what a worker carries out."""

    prompt: str
    negative_prompt: str | None = None
    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    init_image: str | None = None  # this and the other pictures: handles, see common/inputs.py
    strength: float = 1.0
    mask_image: str | None = None
    control_image: str | None = None
    control_scale: float = 0.0
    reference_images: tuple[str, ...] = ()
    loras: tuple[LoraChoice, ...] = ()
    preview: bool = False
    seed: int
    n: int
    format: ImageFormat
    quality: int
    priority: Priority
    template: str | None = None
    deadline_s: float | None = None
    webhook: Webhook | None = None
    metadata: Mapping[str, str] = Field(default_factory=dict)


class Attempt(Stored):
    """One worker's try at a task."""

    worker: str
    gpu: str
    started_at: datetime
    ended_at: datetime | None = None
    outcome: Outcome = "running"


class ImageRef(Stored):
    """A finished picture. `key` is its place in storage and never leaves the server."""

    key: str
    width: int
    height: int
    format: ImageFormat
    bytes: int
    sha256: str
    seed: int


class TaskError(Stored):
    """Why a task failed."""

    code: str
    message: str
    retryable: bool = False


class StageTimings(Stored):
    """Milliseconds that one run spent in each stage on its worker."""

    load_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    store_ms: float = 0.0


class TaskRecord(Wire):
    """A task as its record on Redis tells it."""

    task_id: str
    tenant: str
    status: TaskStatus
    request: ResolvedRequest
    request_id: str = ""
    retry_of: str | None = None  # the task that this one does over
    step: int = 0
    preview: str | None = None  # base64 of a WebP file
    position: int | None = None
    eta_seconds: float | None = None
    attempts: Sequence[Attempt] = ()
    images: Sequence[ImageRef] = ()
    error: TaskError | None = None
    warnings: Sequence[str] = ()
    stages: StageTimings | None = None
    cancel_requested: bool = False
    deliveries: Sequence[Delivery] = ()
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None


class Progress(Wire):
    """Denoising steps done; with several pictures, the slowest one's."""

    step: int
    steps: int
    preview: str | None = Field(default=None, description="A data: URL of a small picture, where one was asked for.")


class ImageView(Wire):
    """A finished picture as a client sees it."""

    url: str
    width: int
    height: int
    format: ImageFormat
    bytes: int
    sha256: str
    seed: int


class Timings(StageTimings):
    """Where the time went, in milliseconds; what has not happened yet is null."""

    queued_ms: float | None = None
    total_ms: float | None = None


class TaskView(Wire):
    """The status of a task: GET /api/status/<task_id>."""

    task_id: str
    tenant: str = ""
    status: TaskStatus
    model: str
    progress: Progress
    position: int | None = Field(
        description="While queued the tasks that start before it if nothing new comes, else null."
    )
    eta_seconds: float | None = Field(description="Estimated seconds to the picture; null when unknown or final.")
    attempts: Sequence[Attempt]
    images: Sequence[ImageView]
    error: TaskError | None
    warnings: Sequence[str]
    timings: Timings
    request: ResolvedRequest
    webhook: WebhookView | None = Field(default=None, description="Null for a task without one.")
    retry_of: str | None = Field(default=None, description="The task that this one does over.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None


class SubmitAnswer(Wire):
    """The answer to an accepted submit."""

    task_id: str
    status: TaskStatus
    status_url: str
    events_url: str
    cancel_url: str
    position: int | None
    eta_seconds: float | None


class InputImage(Wire):
    """The answer to a picture that was sent: POST /api/images."""

    handle: str = Field(description="What a submit names it by.")
    width: int = Field(description="Pixels, once it is upright.")
    height: int
    format: ImageFormat = Field(description="Of the file that was sent.")
    bytes: int = Field(description="Of the file that was sent.")
    expires_at: datetime = Field(description="A submit that names it starts its time anew.")


class TaskSummary(Wire):
    """A line of GET /api/tasks."""

    task_id: str
    tenant: str
    status: TaskStatus
    model: str
    prompt: str = Field(default="", description="Its beginning.")
    n: int = Field(default=1, description="Pictures that were asked for.")
    images: int = Field(default=0, description="Pictures that there are.")
    thumbnail_url: str | None = Field(default=None, description="A small picture of the first; null without any.")
    retry_of: str | None = Field(default=None, description="The task that this one does over.")
    error_code: str | None = Field(default=None, description="Why it failed or expired; its status says more.")
    created_at: datetime
    finished_at: datetime | None


class TaskPage(Wire):
    """GET /api/tasks: newest first; pass `next_cursor` back as `cursor` for the page after."""

    tasks: Sequence[TaskSummary]
    next_cursor: str | None
