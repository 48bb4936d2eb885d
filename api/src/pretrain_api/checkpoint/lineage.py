"""What lies beside the checkpoints of a run, and makes one history of them: identity, lineage records, manifests.

```
<prefix>/job.json                                            JobIdentity, put once
<prefix>/origin.json                                         Origin, put once, where the seed did not draw the weights
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

FORMAT_VERSION = 1
IDENTITY_VERSION = 2
"""Rises when tensors of the same names and shapes mean something else: 2 since rows of `qkv` are grouped by key."""


class StepRange(Frozen):
    """Steps first..last, both included, whose data is skipped."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)


class SlowedRange(Frozen):
    """Steps first..last, both included, whose learning rate is multiplied by `factor`."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    factor: float = Field(gt=0, le=1)


DivergenceCause = Literal["LossSpike", "LossNotFinite"]


class Rollback(Frozen):
    """A return to an earlier state because the loss diverged: what was seen and what was done about it."""

    generation: int = Field(ge=1, description="The number that it took")
    job_uid: str
    cause: DivergenceCause
    step: int = Field(ge=1, description="Where it was noticed; the update of this step was not made")
    since: int = Field(ge=1, description="Where it began")
    to_step: int = Field(ge=0, description="The step that was gone back to; 0: to the beginning")
    skipped: StepRange | None = Field(default=None, description="Steps of data that are passed over from then on")
    slowed: SlowedRange | None = None


class LossMemory(Frozen):
    """What the divergence detector remembers of the steps before, as part of the state: a restart changes no verdict.

    Losses and norms are kept as they are judged, in six digits."""

    losses: tuple[float, ...] = Field(default=(), description="Of the last steps that were no outliers, oldest first")
    norms: tuple[float, ...] = Field(default=(), description="Gradient norms before clipping, of the same steps")
    outliers: tuple[int, ...] = Field(default=(), description="The latest steps that were outliers")
    span: tuple[int, float] = Field(default=(0, 0.0), description="Of the span under way: its steps, and their sum")
    lowest: float | None = Field(default=None, description="Lowest mean loss of a span so far")
    flat_spans: int = Field(default=0, ge=0, description="Spans since then")


class JobIdentity(Frozen):
    """What must be equal for two runs to share a history. Digests are sha256 hex of canonical JSON or of file bytes."""

    version: int = IDENTITY_VERSION
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


class Origin(Frozen):
    """Where the first weights of a history came from, put once before they are loaded: later starts keep to it."""

    version: int = FORMAT_VERSION
    uri: str = Field(description="As the job named it")
    checkpoint: str | None = Field(default=None, description="Key of another run's manifest there; null: Hugging Face")
    step: int | None = Field(default=None, description="Of that run")
    optimizer: bool = Field(default=False, description="What the optimizer keeps was taken over as well")
    sha256: str = Field(description="Of the manifest, or of the names and digests of the weights' files")
    created_at: str = ""

    def __str__(self) -> str:
        """For people."""
        return self.uri if self.step is None else f"step {self.step} of {self.uri}"


class MemoryState(Frozen):
    """A state in the memory of workers: that after `step` updates, of the generation whose record has this nonce."""

    generation: int = Field(ge=1)
    nonce: str
    step: int = Field(ge=0)


class LineageRecord(Frozen):
    """Put by rank 0 before the first step of a generation: it owns the number and says where it goes on from."""

    version: int = FORMAT_VERSION
    generation: int = Field(ge=1)
    nonce: str = Field(description="Random, of the process that put it: tells its own record after a lost answer")
    job_uid: str
    parent: str | None = Field(description="Key of the manifest restored from; null only where no manifest exists")
    world_size: int = Field(ge=1)
    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    rollbacks: tuple[Rollback, ...] = Field(
        default=(), description="All so far, oldest first; the last one is this record's own if it names its number"
    )
    rejected: tuple[str, ...] = Field(default=(), description="Keys of manifests found corrupt and passed over")
    resumed: MemoryState | None = Field(
        default=None, description="The later state in memory, a descendant of `parent`, that was restored instead of it"
    )
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
    slowed: tuple[SlowedRange, ...] = ()
    dropped: tuple[StepRange, ...] = Field(default=(), description="Steps whose update was not made: they diverged")
    watch: LossMemory = LossMemory()
    objects: tuple[StoredObject, ...]
    created_at: str = ""

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return sum(item.size for item in self.objects)


IDENTITY_KEY = "job.json"
ORIGIN_KEY = "origin.json"
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


def data_step(step: int, skipped: Sequence[StepRange]) -> int:
    """The data step that this step trains on: the step-th one that is in no skipped range."""
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
    """The same steps in as few ranges as possible, in order."""
    result: list[StepRange] = []
    for item in sorted(ranges, key=lambda item: (item.first, item.last)):
        if result and item.first <= result[-1].last + 1:
            result[-1] = StepRange(first=result[-1].first, last=max(result[-1].last, item.last))
        else:
            result.append(item)
    return tuple(result)
