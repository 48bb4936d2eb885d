"""What an earlier run left in the folder, and how the next one goes on from it."""

from __future__ import annotations

import io

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus, SlotMemory
from pretrain_api.status.report import RunReport
from pretrain_cli.errors import BadInput
from pretrain_operator.local.run_folder import RunFolder


def refuse_other_job(folder: RunFolder, job: PretrainJob) -> None:
    """Raises BadInput when the folder holds a run of a job with another name."""
    if not folder.job.exists():
        return
    try:
        name = YAML(typ="safe").load(folder.job.read_text())["metadata"]["name"]
    except (YAMLError, TypeError, KeyError) as error:
        raise BadInput(f"--out {folder.path}: {folder.job} can't be read; choose another --out") from error
    if name != job.metadata.name:
        raise BadInput(
            f"--out {folder.path}: holds a run of the job {name!r}, not of {job.metadata.name!r}; choose another --out"
        )


def keep_job(folder: RunFolder, job: PretrainJob) -> None:
    """Write `job.yaml`: the job as it is run, with everything resolved."""
    text = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.dump(job.model_dump(mode="json", exclude_defaults=True), text)
    folder.job.write_text(text.getvalue())


def is_complete(status: JobStatus, total_steps: int) -> bool:
    """The wanted steps have been done and nothing is left to run."""
    return status.phase == "Succeeded" and status.step >= total_steps


def begin(status: JobStatus, total_steps: int) -> JobStatus:
    """The status with which the next run starts: the history stays, the ending goes, failures are forgiven."""
    books = status.bookkeeping
    slots = tuple(SlotMemory(slot=memory.slot, attempt=memory.attempt, counted=True) for memory in books.slots)
    update = {
        "state": "queued",
        "counted_until": None,  # nothing ran between the runs
        "restarts": (),
        "program_failures": 0,
        "last_failure": "",
        "slots": slots,
    }
    return status.model_copy(
        update={
            "phase": "Pending",
            "reason": "",
            "message": "",
            "workers": (),
            "conditions": (),
            "total_steps": total_steps,
            "bookkeeping": books.model_copy(update=update),
        }
    )


def wall_seconds(folder: RunFolder) -> float:
    """How long the runs before took, as their report says; 0 without one."""
    try:
        return RunReport.from_json((folder.path / "report.json").read_bytes()).wall_seconds
    except (FileNotFoundError, ValidationError):
        return 0.0
