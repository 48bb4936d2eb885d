"""Request to the trainer's export program and its progress events.

The request is one JSON object on the program's standard input; each event is a line of JSON on its output.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_api.base import Frozen, Wire
from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_api.messages.trainer_config import TrainerConfig

PROVENANCE_FILE = "pretrain.json"
ExportDtype = Literal["float32", "bfloat16"]


class ExportRequest(Frozen):
    """Request to export a checkpoint of the run that `config` describes to the folder `out`."""

    config: TrainerConfig
    out: str = Field(description="Absolute path of a folder that is empty or does not exist")
    step: int | None = Field(default=None, ge=0, description="Step of the checkpoint; absent: the latest")
    dtype: ExportDtype = "float32"


class Provenance(Frozen):
    """`pretrain.json` in an exported folder: source of the weights and digests of the other files."""

    job: str
    checkpoint: str = Field(description="Key of the manifest")
    step: int
    tokens: int
    tokenizer_digest: str
    files: tuple[StoredObject, ...]


class Staged(Wire):
    """Start of a stage."""

    kind: Literal["stage"] = "stage"
    text: str


class Advanced(Wire):
    """Progress of a stage in bytes."""

    kind: Literal["advanced"] = "advanced"
    done: int
    total: int


class CheckpointSkipped(Wire):
    """A damaged checkpoint is skipped; the one before it is exported."""

    kind: Literal["passed_over"] = "passed_over"
    message: str


class Exported(Wire):
    """The export is complete."""

    kind: Literal["exported"] = "exported"
    step: int
    tokens: int
    checkpoint: str
    parameters: int
    bytes: int


ExportEvent = Annotated[Staged | Advanced | CheckpointSkipped | Exported, Field(discriminator="kind")]
EXPORT_EVENT: TypeAdapter[ExportEvent] = TypeAdapter(ExportEvent)
