"""Folder of a local run: its files, and the lock of its single writer."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from pretrain_api.base import Frozen
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, SampleRecord, StepRecord


class FolderInUse(Exception):
    """Another run holds the lock; the message says what to do."""


class UnreadableStatus(Exception):
    """`status.json` is unreadable; the message says what to do."""


class RunFolder:
    """The folder given by `--out`. As a context manager it holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.trainer_config = path / "trainer.json"
        self.job = path / "job.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.samples = path / "samples.jsonl"
        self.request = path / ".profile-request"
        self._lock: TextIO | None = None
        self._last: dict[Path, tuple[int, ...]] = {}

    def __enter__(self) -> RunFolder:
        """Create and lock the folder. Raises FolderInUse."""
        self.logs.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("w")
        try:
            # Not inherited by children: the lock is released with this process.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise FolderInUse(
                f"--out {self.path}: another `pretrain run` uses this folder: wait for it, stop it, "
                "or choose another --out"
            ) from None
        self._lock = lock
        for lines in (self.metrics, self.evaluations, self.samples):
            _cut_torn_line(lines)
        self.request.unlink(missing_ok=True)  # left by an earlier run
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_status(self) -> JobStatus:
        """Return the status so far, or an empty one with a new uid. Raises UnreadableStatus."""
        if not self.status.exists():
            return JobStatus(job_uid=str(uuid.uuid4()))
        try:
            return JobStatus.from_json(self.status.read_bytes())
        except ValidationError as error:
            raise UnreadableStatus(
                f"{self.status} cannot be read ({error.error_count()} errors): move it away to start a new run "
                "with these checkpoints, or choose another --out"
            ) from error

    def write_status(self, status: JobStatus) -> None:
        """Replace `status.json` atomically."""
        draft = self.status.with_suffix(".json.new")
        draft.write_text(status.model_dump_json(indent=2) + "\n")
        os.replace(draft, self.status)

    def take_request(self) -> str:
        """Return and remove the profile request written since the last call; empty: none."""
        try:
            text = self.request.read_text()
        except FileNotFoundError:
            return ""
        self.request.unlink(missing_ok=True)
        return text

    def append_step(self, record: StepRecord) -> bool:
        """Append to `metrics.jsonl`; False for a repeat by a restarted operator."""
        return self._append(self.metrics, record, (record.generation, record.step))

    def append_evaluation(self, record: EvaluationResult) -> bool:
        """Append to `evaluations.jsonl` or `samples.jsonl`; False for a repeat."""
        if isinstance(record, SampleRecord):
            return self._append(self.samples, record, (record.generation, record.step, record.number))
        return self._append(self.evaluations, record, (record.generation, record.step))

    def _append(self, path: Path, record: Frozen, place: tuple[int, ...]) -> bool:
        if place <= self._last.get(path, ()):
            return False
        self._last[path] = place
        with path.open("a") as file:
            file.write(record.to_json() + "\n")
        return True


def _cut_torn_line(path: Path) -> None:
    """Drop an incomplete last line, for instance of a full disk."""
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
