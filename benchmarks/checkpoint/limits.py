"""Baselines: raw bandwidth of the disk and the S3 service with the same bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

BLOCK = 16 << 20
THREADS = 8
"""Same as in `pretrain_store.s3`."""


def write(path: Path, data: memoryview) -> None:
    """Write sequentially, then fsync."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), BLOCK):
            file.write(data[start : start + BLOCK])
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read sequentially into one buffer."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_caches(folder: Path) -> None:
    """Drop the page cache of the synced files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PlainS3:
    """Plain boto3."""

    def __init__(self, environ: Mapping[str, str], bucket: str) -> None:
        config = Config(max_pool_connections=2 * THREADS, s3={"addressing_style": "path"})
        self._bucket = bucket
        self._transfer = TransferConfig(
            multipart_threshold=BLOCK, multipart_chunksize=BLOCK, max_concurrency=THREADS,
            preferred_transfer_client="classic",
        )  # fmt: skip
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=environ["AWS_ENDPOINT_URL"],
            region_name=environ.get("AWS_REGION", "us-east-1"),
            aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
            config=config,
        )

    def make_bucket(self) -> None:
        """Create the bucket unless it exists."""
        if self._bucket not in {bucket["Name"] for bucket in self._client.list_buckets()["Buckets"]}:
            self._client.create_bucket(Bucket=self._bucket)

    def upload(self, path: Path) -> None:
        """Upload in parts."""
        self._client.upload_file(str(path), self._bucket, "plain", Config=self._transfer)

    def download(self, path: Path) -> None:
        """Download with parallel ranged reads."""
        self._client.download_file(self._bucket, "plain", str(path), Config=self._transfer)

    def clear(self, prefix: str) -> None:
        """Delete the objects of the benchmark."""
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                self._client.delete_object(Bucket=self._bucket, Key=item["Key"])
