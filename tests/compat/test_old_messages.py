"""Messages and files of old code: new code reads and keeps all of them, and old code reads what new code says to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter

from pretrain_api.checkpoint.lineage import JobIdentity, LineageRecord, Manifest, Origin
from pretrain_api.dataset import Dataset
from pretrain_api.messages.protocol import AGENT_MESSAGE, COORDINATOR_MESSAGE, CoordinatorMessage
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord
from pretrain_api.status.report import RunReport
from support.worlds.old import cluster_job, filled, lost, messages, old_python

FORMATS: dict[str, TypeAdapter[Any]] = {
    "AgentMessage": AGENT_MESSAGE,
    "CoordinatorMessage": COORDINATOR_MESSAGE,
    **{
        kind.__name__: TypeAdapter(kind)
        for kind in (
            Dataset, EvaluationRecord, JobIdentity, JobStatus, LineageRecord, Manifest, Origin, RunReport, SampleRecord,
            StepRecord,
        )
    },
}  # fmt: skip
READ_BY_OLD_CODE = """
import sys
from pretrain_api.protocol import COORDINATOR_MESSAGE
for line in sys.stdin:
    print(COORDINATOR_MESSAGE.validate_json(line).to_json())
"""


@pytest.mark.parametrize("format", FORMATS)
def test_what_old_code_wrote_is_read_and_nothing_of_it_is_lost(format: str) -> None:
    written = [old for name, old in messages() if name == format]

    assert written
    for old in written:
        new = json.loads(FORMATS[format].validate_json(json.dumps(old)).to_json())
        assert not lost(old, new)


def test_pods_made_from_an_old_job_s_config_map_have_the_same_configuration() -> None:
    """It is immutable: pods that a new operator adds to the job are made from it too."""
    old = json.loads(cluster_job()["configMaps"][0]["data"]["trainer.json"])

    new = json.loads(TrainerConfig.from_json(json.dumps(old)).to_json())

    assert not lost(old, new)


@pytest.mark.bare
def test_old_agents_read_what_a_new_coordinator_says(code: Path) -> None:
    """Return the minimal message of the case, and the one with every field."""
    before = [old for name, old in messages() if name == "CoordinatorMessage"]
    kinds = {old["kind"] for old in before}
    in_full = [filled(kind, full=True) for kind in coordinator_messages() if kind.model_fields["kind"].default in kinds]
    same = [COORDINATOR_MESSAGE.validate_json(json.dumps(old)) for old in before]

    read = old_python(
        code, "-c", READ_BY_OLD_CODE, given="".join(f"{message.to_json()}\n" for message in same + in_full)
    )

    heard = [json.loads(line) for line in read.splitlines()]
    assert heard[: len(before)] == before
    for message, new in zip(in_full, heard[len(before) :], strict=True):
        assert not lost(new, json.loads(message.to_json()))


def coordinator_messages() -> tuple[type[BaseModel], ...]:
    return get_args(get_args(CoordinatorMessage)[0])
