"""Exporting a checkpoint: what the trainer's export program is asked for, and what it says meanwhile.

The request is one JSON object on the program's standard input; what it says is a line of JSON for each event.
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
    """A checkpoint of the run that `config` describes, wanted in the folder `out`."""

    config: TrainerConfig
    out: str = Field(description="Absolute path of a folder that is empty or not there")
    step: int | None = Field(default=None, ge=0, description="Absent: the newest")
    dtype: ExportDtype = "float32"


class Provenance(Frozen):
    """`pretrain.json` in an exported folder: where the weights came from, and a digest of each other file."""

    job: str
    checkpoint: str = Field(description="Key of the manifest")
    step: int
    tokens: int
    tokenizer_digest: str
    files: tuple[StoredObject, ...]


class Staged(Wire):
    """The program is about to do this."""

    kind: Literal["stage"] = "stage"
    text: str


class Advanced(Wire):
    """So many bytes of the stage are done."""

    kind: Literal["advanced"] = "advanced"
    done: int
    total: int


class PassedOver(Wire):
    """A checkpoint is not what was saved; the one before it is taken."""

    kind: Literal["passed_over"] = "passed_over"
    message: str


class Exported(Wire):
    """The folder is complete."""

    kind: Literal["exported"] = "exported"
    step: int
    tokens: int
    checkpoint: str
    parameters: int
    bytes: int


ExportEvent = Annotated[Staged | Advanced | PassedOver | Exported, Field(discriminator="kind")]
EXPORT_EVENT: TypeAdapter[ExportEvent] = TypeAdapter(ExportEvent)
