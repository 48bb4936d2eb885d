"""What ranks say to their agent, and through it to the coordinator: the bodies of reports.

Ranks send them as JSON lines over the agent's Unix socket (see `pretrain_sdk.rank_link`); the agent adds number,
generation and time and forwards them. Losses are in nats per token, seconds are wall-clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_api.base import Wire
from pretrain_api.checkpoint.lineage import DivergenceCause, Rollback, StepRange


class Started(Wire):
    """A rank's process runs. The first message of each rank; the agent answers it with the Generation."""

    kind: Literal["started"] = "started"
    rank: int
    local_rank: int
    pid: int


class Restored(Wire):
    """A rank's state stands: restored from a checkpoint, or initialised. Sent by global rank 0."""

    kind: Literal["restored"] = "restored"
    step: int = Field(description="Completed steps of the restored state; 0 for a fresh start")
    checkpoint: str | None = Field(default=None, description="Key of the manifest it came from, or descends from")
    recalled: bool = Field(
        default=False, description="It is a descendant of that checkpoint, kept in the memory of workers"
    )
    steps: tuple[StepDone, ...] = Field(
        default=(), description="The last ones before a recalled state: the worker that told them may be lost"
    )
    origin: str | None = Field(default=None, description="Where else the first weights came from, on a fresh start")
    parameters: int = Field(default=0, description="Number of parameters of the model")
    skipped: tuple[StepRange, ...] = Field(default=(), description="Ranges of data passed over")
    rollbacks: tuple[Rollback, ...] = Field(default=(), description="All of this job so far")
    unigram_loss: float | None = Field(
        default=None, description="Loss of the unigram model of the same mix: what knowing only token frequencies gives"
    )
    seconds: dict[str, float] = Field(
        default_factory=dict[str, float], description="Time by stage: list, verify, load…"
    )


class MemoryUse(Wire):
    """Memory of a rank: of its accelerator, as torch's allocator counts it; without one of its process."""

    bytes: int = Field(description="In use now")
    peak_bytes: int = Field(description="Most that was in use so far")
    reserved_bytes: int | None = Field(default=None, description="Held by the allocator, in use or not")
    alloc_retries: int = Field(
        default=0, description="Allocations so far that first had to give cached memory back: it is nearly out"
    )


class StepDone(Wire):
    """One optimizer update, reported by global rank 0. The same fields become a line of `metrics.jsonl`."""

    kind: Literal["step"] = "step"
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int = Field(description="Tokens trained on so far, this step included")
    tokens_per_second: float
    seconds: float = Field(description="Duration of this step")
    stall_seconds: float = Field(default=0.0, description="Of which blocked by a checkpoint's copy")
    data_seconds: float = Field(default=0.0, description="Of which waiting for data")
    compute_seconds: float = Field(default=0.0, description="Of which forward and backward")
    reduce_seconds: float = Field(default=0.0, description="Of which until the sums of all ranks were there")
    optimizer_seconds: float = Field(default=0.0, description="Of which the update; of the step before on a GPU")
    mfu: float | None = Field(
        default=None, description="Share of the devices' peak that the model's FLOPs are; null: the peak is not known"
    )
    loss_contribution: float | None = Field(
        default=None, description="What this rank's micro-batches add to the loss: those of all ranks sum up to it"
    )
    memory: MemoryUse | None = None


class Progress(Wire):
    """A rank other than 0 completed a step: evidence of life, kept only as the newest."""

    kind: Literal["progress"] = "progress"
    step: int
    seconds: float = Field(default=0.0, description="Duration of this step, as this rank saw it")
    data_seconds: float = Field(default=0.0, description="Of which waiting for data")
    compute_seconds: float = Field(default=0.0, description="As in StepDone")
    reduce_seconds: float = Field(default=0.0, description="As in StepDone")
    optimizer_seconds: float = Field(default=0.0, description="As in StepDone")
    stall_seconds: float = Field(default=0.0, description="As in StepDone")
    loss_contribution: float | None = Field(default=None, description="As in StepDone")
    memory: MemoryUse | None = Field(default=None, description="Of the accelerator; null: it has none")


class Saved(Wire):
    """A checkpoint's manifest was put: it is verified and in force. Sent by global rank 0."""

    kind: Literal["saved"] = "saved"
    step: int
    checkpoint: str = Field(description="Key of the manifest")
    bytes: int
    stall_seconds: float = Field(description="How long the step loop waited for the copy")
    seconds: float = Field(description="From the step boundary to the manifest")
    stages: dict[str, float] = Field(
        default_factory=dict[str, float], description="Time by stage: copy, upload (of this rank), agree, commit"
    )


class SaveFailed(Wire):
    """A save did not come to a manifest; the one before stays in force and the next interval tries again."""

    kind: Literal["save_failed"] = "save_failed"
    step: int
    message: str


class Held(Wire):
    """On a command: a checkpoint of this step is in force and the ranks wait. Every rank sends it."""

    kind: Literal["held"] = "held"
    command_id: str
    step: int
    checkpoint: str


class Resumed(Wire):
    """The hold's time was over, nothing came, and the ranks went on. Every rank sends it."""

    kind: Literal["resumed"] = "resumed"
    command_id: str
    step: int


class Profiled(Wire):
    """On a command: a trace of these steps lies in the store. Sent by the rank that was recorded."""

    kind: Literal["profiled"] = "profiled"
    command_id: str
    rank: int
    first_step: int
    last_step: int
    location: str = Field(description="Where the trace is: the store and the key")
    bytes: int


class ProfileFailed(Wire):
    """On a command: there will be no trace."""

    kind: Literal["profile_failed"] = "profile_failed"
    command_id: str
    rank: int
    message: str


class Evaluating(Wire):
    """Between two steps the model is evaluated or writes, which takes the time that it takes. Sent by global rank 0."""

    kind: Literal["evaluating"] = "evaluating"
    step: int


class Evaluated(Wire):
    """Validation losses after this step, by source, and what the user's evaluation came to."""

    kind: Literal["evaluated"] = "evaluated"
    step: int
    losses: dict[str, float]
    metrics: dict[str, float] = Field(default_factory=dict[str, float], description="What the evaluation hook returned")
    problem: str = Field(default="", description="Why it returned nothing of use; empty: it did, or there is none")
    seconds: float


class Sampled(Wire):
    """A text that the model wrote."""

    kind: Literal["sampled"] = "sampled"
    step: int
    number: int = Field(default=0, description="Among the texts of this step, from 0")
    prompt: str
    text: str


class Diverged(Wire):
    """The loss or gradient norm of a step is not finite, or far from what is normal; what is done about it. Sent by
    global rank 0 before it is done."""

    kind: Literal["diverged"] = "diverged"
    step: int = Field(description="Its update is not made, unless the action is Warn")
    since: int = Field(description="The step at which it began")
    cause: DivergenceCause
    action: Literal["Rollback", "Drop", "Warn"]
    seconds: float = Field(default=0.0, description="Since the step at which it began")
    message: str = ""


class RolledBack(Wire):
    """The state of an earlier step stands, under a number that the ranks took in the lineage. Every rank sends it."""

    kind: Literal["rolled_back"] = "rolled_back"
    number: int = Field(description="Generations that are formed from now on have higher ones")
    rollback: Rollback
    checkpoint: str | None = Field(default=None, description="Key of the manifest restored from; null: the beginning")
    tokens: int = 0
    skipped: tuple[StepRange, ...] = Field(default=(), description="All ranges of data passed over")
    count: int = Field(default=1, description="Rollbacks of this job so far, this one included")
    seconds: float = 0.0


class Plateau(Wire):
    """The loss has not been lower for a long while. Nothing is done about it. Sent by global rank 0."""

    kind: Literal["plateau"] = "plateau"
    step: int
    lowest: float = Field(description="The lowest mean loss of a span of steps")


class CheckpointRejected(Wire):
    """The newest checkpoint could not be used (digest mismatch, missing object): the ranks want a generation whose
    `rejected` names it. The ranks exit after this."""

    kind: Literal["checkpoint_rejected"] = "checkpoint_rejected"
    checkpoint: str
    message: str


class NumberTaken(Wire):
    """The lineage has this generation's number already, put by somebody else: a number above `highest` is needed."""

    kind: Literal["number_taken"] = "number_taken"
    highest: int


class Finished(Wire):
    """The last step is done and its checkpoint in force. Sent by global rank 0 before it exits with 0."""

    kind: Literal["finished"] = "finished"
    step: int
    tokens: int
    checkpoint: str


class Blocked(Wire):
    """The rank waits for something outside that somebody must mend, and looks again and again: storage that does not
    answer, a bucket or a source that is missing, credentials that are refused. Said once for each reason and message,
    by global rank 0; not an error, so no restart is spent on it, and no silence is a hang while it lasts."""

    kind: Literal["blocked"] = "blocked"
    reason: str = Field(description="CamelCase, for conditions: `StorageUnavailable`, `BucketMissing`, `DataMissing`")
    message: str = Field(description="What is wrong and what to do about it, in a sentence")


class Unblocked(Wire):
    """What `Blocked` said is mended; the rank goes on."""

    kind: Literal["unblocked"] = "unblocked"


class Failed(Wire):
    """A rank cannot go on, said by itself before it exits, or by its agent when it exited without a word."""

    kind: Literal["failed"] = "failed"
    rank: int
    exit_code: int = Field(default=1, description="Negative: killed by that signal")
    reason: str = Field(description="CamelCase, for conditions: `CollectiveError`, `ConfigInvalid`, `Killed`, …")
    message: str = ""
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
