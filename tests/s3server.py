"""A real S3 server on this machine, for tests: rclone's, which keeps a bucket as a folder."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import boto3
import pytest
import requests

from tests.servers import Server, eventually, free_port

BUCKET = "pictures"
KEY, SECRET = "test-key", "test-secret"


class S3Server(Server):
    """Serves one bucket out of a folder, to whoever signs with KEY and SECRET."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self.folder = folder / "buckets"
        (self.folder / BUCKET).mkdir(parents=True)
        command = [
            str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}",
            "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull,
            str(self.folder),
        ]  # fmt: skip
        super().__init__(command, log=folder / "s3.log")

    def start(self) -> S3Server:
        super().start()
        eventually(self._answers, within_s=20)
        return self

    def age(self, key: str, age_s: float) -> None:
        """Make an object look so old, as this server lets its clients do."""
        at = {"Bucket": BUCKET, "Key": key}
        client = boto3.session.Session().client("s3", endpoint_url=self.endpoint)
        metadata = {"mtime": f"{time.time() - age_s:.3f}"}
        client.copy_object(**at, CopySource=at, MetadataDirective="REPLACE", Metadata=metadata)

    def _answers(self) -> bool:
        try:
            return requests.get(self.endpoint, timeout=5).status_code > 0
        except requests.RequestException:
            return False


def show_credentials(patch: pytest.MonkeyPatch) -> None:
    """Give this process, and those it starts, what the server wants to see."""
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
