"""The folder of a local run: what is kept there, and the lock that makes one run its only writer."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from pretrain_api.base import Frozen
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, SampleRecord, StepRecord


class FolderInUse(Exception):
    """Another run holds the folder; the message says what to do."""


class UnreadableStatus(Exception):
    """`status.json` is no status; the message says what to do."""


class RunFolder:
    """`--out` of a run. A context manager: holds the lock between enter and exit."""

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
        """Create the folder if need be and lock it. Raises FolderInUse."""
        self.logs.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("w")
        try:
            # Not inherited by children: the lock is free the moment this process is gone.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise FolderInUse(
                f"--out {self.path}: another `pretrain run` works in this folder; wait for its end, end it, "
                "or choose another --out"
            ) from None
        self._lock = lock
        for lines in (self.metrics, self.evaluations, self.samples):
            _cut_torn_line(lines)
        self.request.unlink(missing_ok=True)  # Nobody waits for it any more.
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_status(self) -> JobStatus:
        """The status of the run so far, or that of a new one with a new uid. Raises UnreadableStatus."""
        if not self.status.exists():
            return JobStatus(job_uid=str(uuid.uuid4()))
        try:
            return JobStatus.from_json(self.status.read_bytes())
        except ValidationError as error:
            raise UnreadableStatus(
                f"{self.status} can't be read ({error.error_count()} mistakes): move it away to start anew beside the "
                "checkpoints, or choose another --out"
            ) from error

    def write_status(self, status: JobStatus) -> None:
        """Replace `status.json` in one go: a reader sees the old one or the new one."""
        draft = self.status.with_suffix(".json.new")
        draft.write_text(status.model_dump_json(indent=2) + "\n")
        os.replace(draft, self.status)

    def take_request(self) -> str:
        """The text that somebody has put as `request` since the last call; empty: none."""
        try:
            text = self.request.read_text()
        except FileNotFoundError:
            return ""
        self.request.unlink(missing_ok=True)
        return text

    def append_step(self, record: StepRecord) -> bool:
        """Append to `metrics.jsonl`; False: it was there already, said again by a restarted operator."""
        return self._append(self.metrics, record, (record.generation, record.step))

    def append_appraisal(self, record: Appraisal) -> bool:
        """Append to `evaluations.jsonl` or `samples.jsonl`; False: it was there already."""
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
    """Drop a last line that a full disk cut short: the next one would continue it."""
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
