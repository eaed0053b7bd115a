"""Pictures in a bucket of S3 or of anything that speaks its protocol. Any number of hosts share one.

Credentials come as everywhere with S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's own
role. Why boto3: docs/adr/0024.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from common.errors import ConfigurationError, NotStored, StorageError, StorageFull
from common.settings import Settings
from common.storage.base import BaseStorage, checked

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ModuleNotFoundError:
    raise ConfigurationError("ZFLEET_STORAGE=s3 needs boto3: pip install 'zfleet[s3]'") from None

TRIES = 2  # of one call: a kept connection may turn out to be closed. Whoever called may try it all again
BACKOFF_S = 2.0  # botocore rests for a second at most between the two
CONNECTIONS = 32  # of one process
DELETED_AT_ONCE = 1000  # as many as one call may name

_GONE = ("404", "NoSuchKey", "NotFound")
_NO_S3 = (ValueError, KeyError, RecursionError)  # from odd dates, lists without keys, redirects that never end
_NO_ROOM = ("507", "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage")


class Storage(BaseStorage):
    """Objects below ZFLEET_S3_URL. S3 keeps one whole, or not at all, and has it at once for every reader."""

    over_network = True

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet; raises ConfigurationError for no bucket, or AWS variables that are wrong."""
        super().__init__(settings)
        self.limit_s = settings.s3_timeout_s + BACKOFF_S
        if not settings.s3_url:
            raise ConfigurationError("ZFLEET_STORAGE=s3 needs ZFLEET_S3_URL, as s3://bucket/folder")
        bucket, _, prefix = settings.s3_url.removeprefix("s3://").partition("/")
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client = _client(settings, settings.s3_endpoint)
        outside = settings.s3_public_endpoint
        self._signer = _client(settings, outside) if outside else self._client

    def put(self, key: str, data: bytes) -> None:
        with _told("write the picture"):
            self._client.put_object(**self._at(key), Body=data, ContentType=_kind(key))

    def read(self, key: str) -> bytes:
        with _told("read the picture"), self._there():
            data: bytes = self._client.get_object(**self._at(key))["Body"].read()
            return data

    def exists(self, key: str) -> bool:
        try:
            with _told("look for the picture"), self._there():
                self._client.head_object(**self._at(key))
        except NotStored:
            return False
        return True

    def head(self, key: str, count: int) -> bytes:
        with _told("read the picture"):
            data: bytes = self._client.get_object(**self._at(key), Range=f"bytes=0-{count - 1}")["Body"].read()
            return data

    def delete(self, key: str) -> None:
        with _told("remove the picture"):
            self._client.delete_object(**self._at(key))

    def remove(self, folder: str) -> None:
        with _told("remove the pictures"):
            self._delete([found["Key"] for found in self._list(f"{checked(folder)}/")])

    def check(self) -> None:
        with _told("reach the bucket"):
            self._client.head_bucket(Bucket=self._bucket)

    def link(self, key: str, seconds: int) -> str | None:
        with _told("sign a link"):
            url: str = self._signer.generate_presigned_url("get_object", Params=self._at(key), ExpiresIn=seconds)
            return url

    def sweep(self, older_than_s: float) -> int:
        limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
        with _told("sweep the bucket"):
            old = [found["Key"] for found in self._list("") if found["LastModified"] < limit]
            self._delete(old)
        return len(old)

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Raise NotStored for a key that the bucket does not have."""
        try:
            yield
        except ClientError as error:
            if _code(error) not in _GONE:
                raise
            self.check()  # a bucket that is gone has no keys either
            raise NotStored("the picture is not in storage") from None

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked(key)}

    def _list(self, below: str) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + below):
            yield from page.get("Contents", ())

    def _delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), DELETED_AT_ONCE):
            some = [{"Key": key} for key in keys[first : first + DELETED_AT_ONCE]]
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
            if errors := answer.get("Errors"):
                raise StorageError(f"cannot remove {len(errors)} of {len(some)} pictures: {errors[0].get('Code')}")


def _client(settings: Settings, endpoint: str) -> Any:
    config = Config(
        signature_version="s3v4",
        connect_timeout=settings.s3_timeout_s / TRIES,
        read_timeout=settings.s3_timeout_s / TRIES,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        max_pool_connections=CONNECTIONS,
        # what other makers' servers understand, too
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    # a session of its own, as the default one must not be shared between threads
    try:
        return boto3.session.Session().client(
            "s3", endpoint_url=endpoint or None, region_name=settings.s3_region or None, config=config
        )
    except (BotoCoreError, ValueError) as error:  # a profile that is not there, a region that can be none
        raise ConfigurationError(f"ZFLEET_STORAGE=s3: {error}") from None


def _kind(key: str) -> str:
    return f"image/{key.rpartition('.')[2]}"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise _as_told(error, what) from error
    except _NO_S3 as error:
        name = type(error).__name__
        raise StorageError(f"cannot {what}: what answers is no S3 ({name}); look at ZFLEET_S3_ENDPOINT") from error


def _as_told(error: ClientError | BotoCoreError, what: str) -> StorageError:
    """Return what a client or an operator may know of the error: its code, never an address or a key."""
    if not isinstance(error, ClientError):
        return StorageError(f"cannot {what}: {type(error).__name__} at ZFLEET_S3_ENDPOINT; see `zfleet doctor`")
    code = _code(error)
    if code in _NO_ROOM:
        return StorageFull(f"cannot {what}: {code}; free space in the bucket or lower ZFLEET_RETENTION_DAYS")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return StorageError(f"cannot {what}: {code}; look at the access key and what it may do with the bucket")
    return StorageError(f"cannot {what}: {code}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
