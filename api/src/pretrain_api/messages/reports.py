"""Bodies of the reports that ranks send to their agent, and the agent to the coordinator.

Ranks send them as JSON lines over the agent's Unix socket (see `pretrain_sdk.rank_link`); the agent adds sequence
number, generation and time and forwards them. Losses are in nats per token, seconds are wall-clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_api.base import Wire
from pretrain_api.bounds import (
    Count,
    ExitStatus,
    LocalRank,
    Measured,
    Name,
    Number,
    Pid,
    Rank,
    SampleText,
    Seconds,
    Step,
    Text,
)  # fmt: skip
from pretrain_api.checkpoint.lineage import DivergenceCause, Rollback, StepRange

MAX_VALUES = 128
"""Values of an evaluation: a job has at most 64 sources, and a hook gives at most 32 results."""


class Started(Wire):
    """A rank's process has started. First message of each rank; the agent answers with the Generation."""

    kind: Literal["started"] = "started"
    rank: Rank
    local_rank: LocalRank
    pid: Pid


class Restored(Wire):
    """The state is restored from a checkpoint, or initialised. Sent by global rank 0."""

    kind: Literal["restored"] = "restored"
    step: Step = Field(description="Completed steps of the restored state; 0 for a fresh start")
    checkpoint: str | None = Field(
        default=None, description="Key of the restored manifest, or of the one that the state descends from"
    )
    recalled: bool = Field(
        default=False, description="True: a descendant of that checkpoint was restored from workers' memory"
    )
    steps: tuple[StepDone, ...] = Field(
        default=(),
        description="Last steps before a state restored from memory: the worker that reported them may be lost",
    )
    origin: str | None = Field(
        default=None, description="Source of the initial weights on a fresh start, if not the seed"
    )
    parameters: Count = Field(default=0, description="Number of model parameters")
    skipped: tuple[StepRange, ...] = Field(default=(), description="Skipped ranges of data")
    rollbacks: tuple[Rollback, ...] = Field(default=(), description="All rollbacks of this job")
    unigram_loss: Measured | None = Field(
        default=None, description="Loss of the unigram model of the same mix, which knows token frequencies only"
    )
    seconds: dict[Name, Seconds] = Field(
        default_factory=dict[str, float], max_length=64, description="Time by stage: list, verify, load…"
    )


class MemoryUse(Wire):
    """Memory of a rank: of its accelerator, as counted by torch's allocator, or else of its process."""

    bytes: Count = Field(description="Bytes in use")
    peak_bytes: Count = Field(description="Peak bytes in use")
    reserved_bytes: Count | None = Field(default=None, description="Bytes held by the allocator, in use or cached")
    alloc_retries: Count = Field(
        default=0,
        description="Allocations that succeeded only after freeing cached memory: the device is nearly out of memory",
    )


class StepDone(Wire):
    """Completed optimizer update, reported by global rank 0 and written to `metrics.jsonl`."""

    kind: Literal["step"] = "step"
    step: Step
    loss: Measured
    grad_norm: Measured
    learning_rate: Measured
    tokens: Count = Field(description="Tokens trained on so far, this step included")
    tokens_per_second: float
    seconds: Seconds = Field(description="Duration of this step")
    stall_seconds: Seconds = Field(default=0.0, description="Checkpoint stall within the step")
    data_seconds: Seconds = Field(default=0.0, description="Data wait within the step")
    compute_seconds: Seconds = Field(default=0.0, description="Forward and backward within the step")
    reduce_seconds: Seconds = Field(default=0.0, description="All-reduce wait within the step")
    optimizer_seconds: Seconds = Field(
        default=0.0, description="Optimizer update within the step; on a GPU that of the step before"
    )
    mfu: float | None = Field(default=None, description="Model FLOPs over the devices' peak; null: the peak is unknown")
    loss_contribution: Measured | None = Field(
        default=None,
        description="Contribution of this rank's micro-batches to the loss; all ranks' contributions add up to it",
    )
    memory: MemoryUse | None = None


class Progress(Wire):
    """Step completed by a rank other than 0: evidence of progress, only the latest is kept."""

    kind: Literal["progress"] = "progress"
    step: Step
    seconds: Seconds = Field(default=0.0, description="Duration of this step on this rank")
    data_seconds: Seconds = Field(default=0.0, description="Data wait within the step")
    compute_seconds: Seconds = Field(default=0.0, description="As in StepDone")
    reduce_seconds: Seconds = Field(default=0.0, description="As in StepDone")
    optimizer_seconds: Seconds = Field(default=0.0, description="As in StepDone")
    stall_seconds: Seconds = Field(default=0.0, description="As in StepDone")
    loss_contribution: Measured | None = Field(default=None, description="As in StepDone")
    memory: MemoryUse | None = Field(default=None, description="Memory of the accelerator; null: no accelerator")


class Saved(Wire):
    """A checkpoint is verified and committed: its manifest was put. Sent by global rank 0."""

    kind: Literal["saved"] = "saved"
    step: Step
    checkpoint: str = Field(description="Key of the manifest")
    bytes: Count
    stall_seconds: Seconds = Field(description="Checkpoint stall: time that the step loop waited for the copy")
    seconds: Seconds = Field(description="Time from the step boundary to the manifest")
    stages: dict[Name, Seconds] = Field(
        default_factory=dict[str, float],
        max_length=64,
        description="Time by stage: copy, upload (of this rank), agree, commit",
    )


class SaveFailed(Wire):
    """A save failed; the previous checkpoint stays current and the next interval retries."""

    kind: Literal["save_failed"] = "save_failed"
    step: Step
    message: Text


class Held(Wire):
    """The ranks hold after a checkpoint command: the checkpoint of this step is committed. Sent by every rank."""

    kind: Literal["held"] = "held"
    command_id: Name
    step: Step
    checkpoint: str


class Resumed(Wire):
    """The hold timed out and the ranks resumed training. Sent by every rank."""

    kind: Literal["resumed"] = "resumed"
    command_id: Name
    step: Step


class Profiled(Wire):
    """The trace of a profile command is in the store. Sent by the recorded rank."""

    kind: Literal["profiled"] = "profiled"
    command_id: Name
    rank: Rank
    first_step: Step
    last_step: Step
    location: str = Field(description="Location of the trace: store and key")
    bytes: Count


class ProfileFailed(Wire):
    """A profile command failed: there is no trace."""

    kind: Literal["profile_failed"] = "profile_failed"
    command_id: Name
    rank: Rank
    message: Text


class Evaluating(Wire):
    """An evaluation or sampling between two steps has started; its duration is unbounded. Sent by global rank 0."""

    kind: Literal["evaluating"] = "evaluating"
    step: Step


class Evaluated(Wire):
    """Validation losses after this step, by source, and the results of the evaluation hook."""

    kind: Literal["evaluated"] = "evaluated"
    step: Step
    losses: dict[Name, Measured] = Field(max_length=MAX_VALUES)
    metrics: dict[Name, Measured] = Field(
        default_factory=dict[str, float], max_length=MAX_VALUES, description="Results of the evaluation hook"
    )
    problem: Text = Field(default="", description="Error of the evaluation hook; empty: no error, or no hook")
    seconds: Seconds


class Sampled(Wire):
    """Text sampled from the model."""

    kind: Literal["sampled"] = "sampled"
    step: Step
    number: Count = Field(default=0, description="Index among the texts of this step, from 0")
    prompt: SampleText
    text: SampleText


class Diverged(Wire):
    """Divergence: the loss or gradient norm of a step is not finite, or a spike.

    Sent by global rank 0 before the action.
    """

    kind: Literal["diverged"] = "diverged"
    step: Step = Field(description="Step whose update is not applied, unless the action is Warn")
    since: Step = Field(description="First diverged step")
    cause: DivergenceCause
    action: Literal["Rollback", "Drop", "Warn"]
    seconds: Seconds = Field(default=0.0, description="Seconds since the first diverged step")
    message: Text = ""


class RolledBack(Wire):
    """The state of an earlier step is restored, under a number that the ranks claimed in the lineage.

    Sent by every rank.
    """

    kind: Literal["rolled_back"] = "rolled_back"
    number: Number = Field(description="Claimed number; later generations have higher ones")
    rollback: Rollback
    checkpoint: str | None = Field(default=None, description="Key of the restored manifest; null: the initial weights")
    tokens: Count = 0
    skipped: tuple[StepRange, ...] = Field(default=(), description="All skipped ranges of data")
    count: Count = Field(default=1, description="Rollbacks of this job, including this one")
    seconds: Seconds = 0.0


class Plateau(Wire):
    """The loss has stopped improving. Informational. Sent by global rank 0."""

    kind: Literal["plateau"] = "plateau"
    step: Step
    lowest: Measured = Field(description="Lowest mean loss of a span of steps")


class CheckpointRejected(Wire):
    """The latest checkpoint is unusable (digest mismatch, missing object).

    The ranks exit and expect a generation whose `rejected` names it.
    """

    kind: Literal["checkpoint_rejected"] = "checkpoint_rejected"
    checkpoint: str
    message: Text


class NumberTaken(Wire):
    """Another process has claimed this generation's number: a number above `highest` is needed."""

    kind: Literal["number_taken"] = "number_taken"
    highest: Number


class Finished(Wire):
    """The last step is done and its checkpoint committed. Sent by global rank 0 before it exits with 0."""

    kind: Literal["finished"] = "finished"
    step: Step
    tokens: Count
    checkpoint: str


class Blocked(Wire):
    """The rank waits and retries until an external problem is fixed, such as unreachable storage.

    Sent by global rank 0 once for each reason and message. No error: it costs no restart, and hang detection is off.
    """

    kind: Literal["blocked"] = "blocked"
    reason: Name = Field(description="CamelCase, for conditions: `StorageUnavailable`, `BucketMissing`, `DataMissing`")
    message: Text = Field(description="Problem and fix, in a sentence")


class Unblocked(Wire):
    """The problem that `Blocked` reported is resolved; the rank resumes."""

    kind: Literal["unblocked"] = "unblocked"


class Failed(Wire):
    """A rank fails: sent by the rank before it exits, or by its agent if it exits without a report."""

    kind: Literal["failed"] = "failed"
    rank: Rank
    exit_code: ExitStatus = Field(default=1, description="Exit code; negative: killed by that signal")
    reason: Name = Field(description="CamelCase, for conditions: `CollectiveError`, `ConfigInvalid`, `Killed`, …")
    message: Text = ""
    retryable: bool = True


ReportBody = Annotated[
    Started
    | Restored
    | StepDone
    | Progress
    | Saved
    | SaveFailed
    | Held
    | Resumed
    | Profiled
    | ProfileFailed
    | Evaluating
    | Evaluated
    | Sampled
    | Diverged
    | RolledBack
    | Plateau
    | CheckpointRejected
    | NumberTaken
    | Finished
    | Blocked
    | Unblocked
    | Failed,
    Field(discriminator="kind"),
]
REPORT_BODY: TypeAdapter[ReportBody] = TypeAdapter(ReportBody)
