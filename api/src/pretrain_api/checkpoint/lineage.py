"""Files beside a run's checkpoints that make them one history: identity, lineage records, manifests.

```
<prefix>/job.json                                            JobIdentity, put once
<prefix>/origin.json                                         Origin, put once, if the seed does not give the weights
<prefix>/lineage/g000007.json                                LineageRecord, put if absent: the lock of a generation
<prefix>/checkpoints/g000007/step-000012000/…                shards, DCP metadata
<prefix>/checkpoints/g000007/step-000012000/manifest.json    Manifest, put last and if absent: the commit
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.bounds import Name, Number, Step

FORMAT_VERSION = 1
IDENTITY_VERSION = 2
"""Incremented when tensors of the same name and shape change meaning: 2 since rows of `qkv` are grouped by key."""


class StepRange(Frozen):
    """Steps first..last, both included, whose data is skipped."""

    first: Step = Field(ge=1)
    last: Step = Field(ge=1)


class SlowedRange(Frozen):
    """Steps first..last, both included, whose learning rate is multiplied by `factor`."""

    first: Step = Field(ge=1)
    last: Step = Field(ge=1)
    factor: float = Field(gt=0, le=1)


DivergenceCause = Literal["LossSpike", "LossNotFinite"]


class Rollback(Frozen):
    """Rollback to an earlier state after a divergence: its cause and the measures taken."""

    generation: Number = Field(ge=1, description="Generation number that the rollback took")
    job_uid: Name
    cause: DivergenceCause
    step: Step = Field(ge=1, description="Step that detected the divergence; its update was not applied")
    since: Step = Field(ge=1, description="First diverged step")
    to_step: Step = Field(ge=0, description="Step rolled back to; 0: the initial weights")
    skipped: StepRange | None = Field(default=None, description="Steps of data skipped from then on")
    slowed: SlowedRange | None = None


class LossMemory(Frozen):
    """State of the divergence detector, saved with checkpoints so that a restart changes no verdict.

    Losses and norms are rounded to six digits, as the detector judges them.
    """

    losses: tuple[float, ...] = Field(
        default=(), description="Losses of the last steps that are no outliers, oldest first"
    )
    norms: tuple[float, ...] = Field(default=(), description="Gradient norms before clipping, of the same steps")
    outliers: tuple[int, ...] = Field(default=(), description="Latest outlier steps")
    span: tuple[int, float] = Field(
        default=(0, 0.0), description="Steps of the current span and the sum of their losses"
    )
    lowest: float | None = Field(default=None, description="Lowest mean loss of any span")
    flat_spans: int = Field(default=0, ge=0, description="Spans since the lowest one")


class JobIdentity(Frozen):
    """Properties that runs of one history share. Digests are sha256 hex of canonical JSON or of file bytes."""

    version: int = IDENTITY_VERSION
    model_digest: str
    data_digest: str
    tokenizer_digest: str
    seed: int
    batch_sequences: int
    context: int
    model: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="Fields behind `model_digest`, for exports and for runs that start from this one",
    )


class Origin(Frozen):
    """Origin of a history's initial weights, put once before they are loaded; later starts use the same origin."""

    version: int = FORMAT_VERSION
    uri: str = Field(description="URI as the job names it")
    checkpoint: str | None = Field(default=None, description="Key of the other run's manifest; null: Hugging Face")
    step: int | None = Field(default=None, description="Step of the other run")
    optimizer: bool = Field(default=False, description="Optimizer state was taken over too")
    sha256: str = Field(description="Digest of the manifest, or of the names and digests of the weight files")
    created_at: str = ""

    def __str__(self) -> str:
        """Describe the origin for people."""
        return self.uri if self.step is None else f"step {self.step} of {self.uri}"


class MemoryState(Frozen):
    """State in workers' memory: after `step` updates of the generation whose record has this nonce."""

    generation: int = Field(ge=1)
    nonce: str
    step: int = Field(ge=0)


class LineageRecord(Frozen):
    """Record put by rank 0 before a generation's first step: claims the number and names the parent checkpoint."""

    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    nonce: str = Field(
        description="Random, chosen by the process that put it: identifies its own record after a lost response"
    )
    job_uid: str
    parent: str | None = Field(description="Key of the manifest restored from; null only where no manifest exists")
    world_size: int = Field(ge=1)
    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    rollbacks: tuple[Rollback, ...] = Field(
        default=(), description="All rollbacks, oldest first; the last one is this record's own if it names its number"
    )
    rejected: tuple[str, ...] = Field(default=(), description="Keys of manifests found corrupt and skipped")
    resumed: MemoryState | None = Field(
        default=None, description="Later state in memory, a descendant of `parent`, restored instead of it"
    )
    reason: str
    created_at: str = Field(default="", description="RFC 3339, informational")


class StoredObject(Frozen):
    """Object of a checkpoint. `key` is relative to the checkpoint's folder, `sha256` is of the stored bytes."""

    key: str
    size: int = Field(ge=0)
    sha256: str


class Manifest(Frozen):
    """Commit marker of a checkpoint, put last. A folder without a manifest is no checkpoint."""

    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    world_size: int = Field(ge=1)
    job_uid: str
    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    dropped: tuple[StepRange, ...] = Field(default=(), description="Diverged steps whose update was not applied")
    watch: LossMemory = LossMemory()
    objects: tuple[StoredObject, ...]
    created_at: str = ""

    @property
    def bytes(self) -> int:
        """Total size of all objects."""
        return sum(item.size for item in self.objects)


IDENTITY_KEY = "job.json"
ORIGIN_KEY = "origin.json"
_RECORD = re.compile(r"lineage/g(\d{6,})\.json")
_MANIFEST = re.compile(r"checkpoints/g(\d{6,})/step-(\d{9,})/manifest\.json")


def record_key(generation: int) -> str:
    """Return the key of a generation's lineage record, relative to the prefix."""
    return f"lineage/g{generation:06d}.json"


def checkpoint_folder(generation: int, step: int) -> str:
    """Return the folder of a checkpoint, relative to the prefix, without a trailing slash."""
    return f"checkpoints/g{generation:06d}/step-{step:09d}"


def manifest_key(generation: int, step: int) -> str:
    """Return the key of a checkpoint's manifest, relative to the prefix: the checkpoint's name everywhere."""
    return f"{checkpoint_folder(generation, step)}/manifest.json"


def parse_record_key(key: str) -> int | None:
    """Parse the generation from a lineage record's key; None: another key."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) if match else None


def parse_manifest_key(key: str) -> tuple[int, int] | None:
    """Parse (generation, step) from a manifest's key; None: another key."""
    match = _MANIFEST.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def data_step(step: int, skipped: Sequence[StepRange]) -> int:
    """Return the data step that this step trains on: the step-th one outside the skipped ranges."""
    passed = 0
    for gap in sorted(skipped, key=lambda item: item.first):
        first = max(gap.first, passed + 1)
        if gap.last < first:
            continue
        if first > step:
            break
        step += gap.last - first + 1
        passed = gap.last
    return step


def merged(ranges: Iterable[StepRange]) -> tuple[StepRange, ...]:
    """Merge adjacent and overlapping ranges, in order."""
    result: list[StepRange] = []
    for item in sorted(ranges, key=lambda item: (item.first, item.last)):
        if result and item.first <= result[-1].last + 1:
            result[-1] = StepRange(first=result[-1].first, last=max(result[-1].last, item.last))
        else:
            result.append(item)
    return tuple(result)
