"""Where pictures are kept: a disk with room for them, or as in a bucket, where one is put, fetched, removed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import requests

from common.errors import ConfigurationError, StorageError
from common.storage import open_storage
from common.storage.base import BaseStorage
from zfleet.doctor import files
from zfleet.doctor.report import Finding, Patient

CALL_S = 5.0
LINK_S = 60
PROBE = b"zfleet doctor"
REMEDY = "see ZFLEET_S3_URL, ZFLEET_S3_ENDPOINT, and what AWS_ACCESS_KEY_ID may do there: docs/operations.md"


def check(patient: Patient) -> Iterator[Finding]:
    """Look at the storage of ZFLEET_STORAGE."""
    settings = patient.settings
    if settings.storage == "local":
        yield from files.disk(patient)
        return
    where = settings.s3_url or settings.storage
    key = f"doctor/{secrets.token_hex(8)}"
    try:
        kept = open_storage(settings)
        kept.check()
        kept.put(key, PROBE)
        try:
            same, link = kept.read(key) == PROBE, _link(kept, key)
        finally:
            kept.delete(key)
    except ConfigurationError as error:
        yield Finding("storage", "problem", error.message)
    except StorageError as error:  # its cause says more than a client may know
        yield Finding("storage", "problem", f"{where}: {error.__cause__ or error.message}", REMEDY)
    else:
        if not same:
            yield Finding("storage", "problem", f"{where} gives back other bytes than it was given", REMEDY)
        else:
            yield Finding("storage", "ok", f"{where} takes a picture, gives it back, and removes it")
        yield from link


def _link(kept: BaseStorage, key: str) -> list[Finding]:
    """Judge what clients are sent to, if they are sent anywhere, as far as that can be told from here."""
    url = kept.link(key, LINK_S)
    if url is None:
        return []
    remedy = "see ZFLEET_S3_PUBLIC_ENDPOINT; fine if clients reach it and this machine need not"
    try:
        answer = requests.get(url, timeout=CALL_S)
    except requests.RequestException as error:
        return [Finding("storage link", "warning", f"nobody answers a signed link: {type(error).__name__}", remedy)]
    if answer.content != PROBE:
        return [Finding("storage link", "warning", f"a signed link is answered {answer.status_code}", remedy)]
    return [Finding("storage link", "ok", "a signed link fetches it")]
