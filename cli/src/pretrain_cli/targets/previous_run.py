"""State of the previous run in a folder, and the status from which the next run resumes."""

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


def check_same_job(folder: RunFolder, job: PretrainJob) -> None:
    """Raise BadInput if the folder holds a run of a job with another name."""
    if not folder.job.exists():
        return
    try:
        name = YAML(typ="safe").load(folder.job.read_text())["metadata"]["name"]
    except (YAMLError, TypeError, KeyError) as error:
        raise BadInput(f"--out {folder.path}: {folder.job} cannot be read; choose another --out") from error
    if name != job.metadata.name:
        raise BadInput(
            f"--out {folder.path}: holds a run of the job {name!r}, not of {job.metadata.name!r}; choose another --out"
        )


def write_job(folder: RunFolder, job: PretrainJob) -> None:
    """Write `job.yaml`: the resolved job."""
    text = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.dump(job.model_dump(mode="json", exclude_defaults=True), text)
    folder.job.write_text(text.getvalue())


def is_complete(status: JobStatus, total_steps: int) -> bool:
    """Return True if all steps of the job are done."""
    return status.phase == "Succeeded" and status.step >= total_steps


def next_status(status: JobStatus, total_steps: int) -> JobStatus:
    """Return the initial status of the next run: keeps the history, clears the result and resets failures."""
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
    """Return the duration of the previous runs from their report; 0 without one."""
    try:
        return RunReport.from_json((folder.path / "report.json").read_bytes()).wall_seconds
    except (FileNotFoundError, ValidationError):
        return 0.0
