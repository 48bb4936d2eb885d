"""Places of a checkpoint, with raw reads and writes of the same bytes as the baseline."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import limits
from work import Work

from pretrain_api.spec.job import S3Storage, Storage


@dataclass(frozen=True)
class Measurement:
    """Measurement to take. `bucket` is on the service that the environment names."""

    what: str
    parameters: float
    rounds: int
    folder: str
    bucket: str
    patience: float
    """Maximum seconds to wait for idle cores before each bandwidth measurement."""


class FolderPlace:
    """Folder on the measured disk."""

    def __init__(self, measurement: Measurement) -> None:
        self._path = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir=measurement.folder))
        self.storage = Storage(path=str(self._path / "ours"))
        self._data = bytearray()

    def like_ours(self, work: Work) -> list[Path]:
        """Allocate as much data as our checkpoint has; return its files."""
        files = [path for path in (self._path / "ours" / "checkpoints").rglob("*") if path.is_file()]
        self._data = bytearray(os.urandom(1 << 20) * (sum(path.stat().st_size for path in files) >> 20))
        return files

    def save_plainly(self) -> float:
        """Write to a new file and then replace the previous one, as checkpoints do."""
        new = self._path / "plain.new"
        began = time.perf_counter()
        limits.write(new, memoryview(self._data))
        seconds = time.perf_counter() - began
        new.replace(self._path / "plain")
        self.drop_caches()
        return seconds

    def restore_plainly(self) -> float:
        self.drop_caches()
        began = time.perf_counter()
        limits.read(self._path / "plain")
        return time.perf_counter() - began

    def drop_caches(self) -> None:
        limits.drop_caches(self._path)

    def close(self) -> None:
        shutil.rmtree(self._path)


class BucketPlace:
    """Bucket of an S3 service; local files are in memory."""

    def __init__(self, measurement: Measurement) -> None:
        self._plain = limits.PlainS3(os.environ, measurement.bucket)
        self._plain.make_bucket()
        self._prefix = f"pretrain-bench-{os.getpid()}"
        self.storage = Storage(
            s3=S3Storage(bucket=measurement.bucket, prefix=self._prefix, endpoint=os.environ["AWS_ENDPOINT_URL"])
        )
        self._memory = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir="/dev/shm"))

    def like_ours(self, work: Work) -> list[Path]:
        path = self._memory / "source"
        path.write_bytes(os.urandom(1 << 20) * (work.bytes >> 20))
        return [path]

    def save_plainly(self) -> float:
        began = time.perf_counter()
        self._plain.upload(self._memory / "source")
        return time.perf_counter() - began

    def restore_plainly(self) -> float:
        target = self._memory / "target"
        began = time.perf_counter()
        self._plain.download(target)
        seconds = time.perf_counter() - began
        target.unlink()
        return seconds

    def drop_caches(self) -> None:
        """Do nothing: nothing is cached."""

    def close(self) -> None:
        shutil.rmtree(self._memory)
        self._plain.clear("plain")
        self._plain.clear(self._prefix)
