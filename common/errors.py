"""Everything that can go wrong and has a name. An error knows its code and whether to retry, never an HTTP status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class FieldError(NamedTuple):
    """One field of a request that was refused: where it stands and what would be accepted."""

    loc: str
    msg: str


class FleetError(Exception):
    """Base of every error that may reach a client or a log line.

    `code` is stable and meant for programs; the message is for people and names the remedy;
    `retryable` says whether the same request may succeed later.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.errors = tuple(errors)


class InvalidRequest(FleetError):
    """Raised when a request's fields are missing, of the wrong type or out of range."""

    code = "invalid_request"

    @classmethod
    def field(cls, loc: str, msg: str) -> InvalidRequest:
        """Return the error for a single field."""
        return cls(f"{loc}: {msg}", errors=[FieldError(loc, msg)])


class UnknownModel(InvalidRequest):
    """Raised when a request names a model that this fleet does not serve."""

    code = "unknown_model"


class UnknownLora(InvalidRequest):
    """Raised when a request names a LoRA that is not in the worker's folder."""

    code = "unknown_lora"


class MalformedBody(InvalidRequest):
    """Raised when a request's body is not a JSON object, so that it has no fields to speak of."""

    code = "malformed_body"


class UnsupportedMediaType(InvalidRequest):
    """Raised when a request says that its body is something that is not read here."""

    code = "unsupported_media_type"


class UnknownTask(FleetError):
    """Raised when no task has this id, or when it belongs to another tenant: the two look the same."""

    code = "unknown_task"


class UnknownImage(FleetError):
    """Raised when a task has no such picture: not yet, not of that format, or not at all."""

    code = "unknown_image"


class TaskExpired(FleetError):
    """Raised when a task's result is past its retention and has been removed."""

    code = "task_expired"


class TaskFailed(FleetError):
    """Raised by a call that answers with pictures when its task ended without any."""

    code = "task_failed"


class TaskCanceled(FleetError):
    """Raised by a call that answers with pictures when somebody canceled its task meanwhile."""

    code = "task_canceled"


class TaskUnfinished(FleetError):
    """Raised by a call that answers with pictures when it has waited as long as it may. The task goes on."""

    code = "task_unfinished"
    retryable = True


class AlreadyFinal(FleetError):
    """Raised when a task that has already ended is asked to change."""

    code = "already_final"


class NotRetryable(FleetError):
    """Raised when a task that goes on, or has succeeded, is asked to be done over."""

    code = "not_retryable"


class IdempotencyConflict(FleetError):
    """Raised when an Idempotency-Key comes back with a different request body."""

    code = "idempotency_conflict"


class Unauthenticated(FleetError):
    """Raised when a call has no API key, or one that opens nothing: which of the two, and why, is not told."""

    code = "unauthenticated"


class Forbidden(FleetError):
    """Raised when an API key is good, but not for this call."""

    code = "forbidden"


class RateLimited(FleetError):
    """Raised when a key submits faster than it may. `retry_after_s` is when the next submit would be let through."""

    code = "rate_limited"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaUsedUp(FleetError):
    """Raised when as many tasks of a key stand in line as it may have there. `retry_after_s` is when the first of them
    is likely to begin.
    """

    code = "quota_used_up"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLate(FleetError):
    """Raised when a task that is to be refused if late would end after its deadline."""

    code = "too_late"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, errors=[FieldError("deadline_s", message)])
        self.retry_after_s = retry_after_s


class QueueFull(FleetError):
    """Raised when a queue is at its cap; nothing was accepted."""

    code = "queue_full"
    retryable = True


class RedisUnavailable(FleetError):
    """Raised when Redis did not answer, or refused writes, within the time the caller had."""

    code = "redis_unavailable"
    retryable = True


class UnknownKey(FleetError):
    """Raised when no API key has this id."""

    code = "unknown_key"


class KeyNotActive(FleetError):
    """Raised when an API key that was rotated or revoked, or has expired, is to be rotated."""

    code = "key_not_active"


class UnknownWorker(FleetError):
    """Raised when no live worker has this name."""

    code = "unknown_worker"


class NoWorker(FleetError):
    """Raised when no worker is alive, so that a task would wait for one to be started."""

    code = "no_worker"
    retryable = True


class StorageError(FleetError):
    """Raised when a result could not be written to, or read from, storage."""

    code = "storage_error"
    retryable = True


class NotStored(StorageError):
    """Raised when a storage that can be reached has no such object."""


class StorageFull(StorageError):
    """Raised when there is no room for a result: no space left, a quota used up, or new tasks paused before that."""

    code = "storage_full"


class TooBusy(FleetError):
    """Raised when more pictures arrive at once than there is memory for, or time to decode, within a wait."""

    code = "too_busy"
    retryable = True


class InputGone(FleetError):
    """Raised when a picture that a task is made from is no longer in storage."""

    code = "input_gone"


class ModelLoadFailed(FleetError):
    """Raised when a model's files are missing or cannot be loaded on this device."""

    code = "model_load_failed"


class PipelineFailed(FleetError):
    """Raised when the pipeline could not make a picture from a request."""

    code = "pipeline_failed"


class LoraUnusable(PipelineFailed):
    """Raised when a LoRA's file cannot be read, or does not fit the model."""

    code = "lora_unusable"


class OutOfMemory(PipelineFailed):
    """Raised when a picture does not fit into the device's memory, alone or beside the others."""

    code = "out_of_memory"
    retryable = True


class DeviceFailed(FleetError):
    """Raised when the device itself has failed, so that this process can do nothing more on it."""

    code = "device_failed"
    retryable = True


class DeadlineExceeded(FleetError):
    """Raised when a run passes its task's deadline or its model's limit; it stops at the next step."""

    code = "deadline_exceeded"


class ClientError(FleetError):
    """Raised by the Python client when the gateway cannot be reached or refuses a call."""

    code = "client_error"


class ConfigurationError(FleetError):
    """Raised when a setting, a flag or a file that the operator wrote cannot be used."""

    code = "configuration"
