"""What lies beside the checkpoints of a run, and makes one history of them: identity, lineage records, manifests.

```
<prefix>/job.json                                            JobIdentity, put once
<prefix>/lineage/g000007.json                                LineageRecord, put if absent: the lock of a generation
<prefix>/checkpoints/g000007/step-000012000/…                shards, DCP metadata
<prefix>/checkpoints/g000007/step-000012000/manifest.json    Manifest, put last and if absent: the commit
```
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from pretrain_api.base import Frozen

FORMAT_VERSION = 1


class StepRange(Frozen):
    """Steps first..last, both included, whose data is skipped."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)


class JobIdentity(Frozen):
    """What must be equal for two runs to share a history. Digests are sha256 hex of canonical JSON or of file bytes."""

    version: int = FORMAT_VERSION
    model_digest: str
    data_digest: str
    tokenizer_digest: str
    seed: int
    batch_sequences: int
    context: int
    model: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="What `model_digest` is of, for whoever exports the model or starts another run from it",
    )


class LineageRecord(Frozen):
    """Put by rank 0 before the first step of a generation: it owns the number and says where it goes on from."""

    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    nonce: str = Field(description="Random, of the process that put it: tells its own record after a lost answer")
    job_uid: str
    parent: str | None = Field(description="Key of the manifest restored from; null only where no manifest exists")
    world_size: int = Field(ge=1)
    skipped: tuple[StepRange, ...] = ()
    rejected: tuple[str, ...] = Field(default=(), description="Keys of manifests found corrupt and passed over")
    reason: str
    created_at: str = Field(default="", description="RFC 3339, for people; no rule reads it")


class StoredObject(Frozen):
    """One object of a checkpoint. `key` is relative to the checkpoint's folder, `sha256` of the very bytes loaded."""

    key: str
    size: int = Field(ge=0)
    sha256: str


class Manifest(Frozen):
    """The commit of a checkpoint: put last. Only a folder that has one is a checkpoint."""

    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    world_size: int = Field(ge=1)
    job_uid: str
    skipped: tuple[StepRange, ...] = ()
    objects: tuple[StoredObject, ...]
    created_at: str = ""

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return sum(item.size for item in self.objects)


IDENTITY_KEY = "job.json"
_RECORD = re.compile(r"lineage/g(\d{6,})\.json")
_MANIFEST = re.compile(r"checkpoints/g(\d{6,})/step-(\d{9,})/manifest\.json")


def record_key(generation: int) -> str:
    """Key of a generation's lineage record, relative to the prefix."""
    return f"lineage/g{generation:06d}.json"


def checkpoint_folder(generation: int, step: int) -> str:
    """Folder of a checkpoint, relative to the prefix, without a trailing slash."""
    return f"checkpoints/g{generation:06d}/step-{step:09d}"


def manifest_key(generation: int, step: int) -> str:
    """Key of a checkpoint's manifest, relative to the prefix: the name by which a checkpoint is known everywhere."""
    return f"{checkpoint_folder(generation, step)}/manifest.json"


def parse_record_key(key: str) -> int | None:
    """The generation of a lineage record's key, or None when it is no such key."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) if match else None


def parse_manifest_key(key: str) -> tuple[int, int] | None:
    """(generation, step) of a manifest's key, or None when it is no such key."""
    match = _MANIFEST.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None
