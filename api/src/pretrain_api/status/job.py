"""Status of a job: the resource's `.status`, and `status.json` of a local run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.checkpoint.lineage import StepRange

GoodputState = Literal[
    "queued", "starting", "restoring", "training", "evaluating", "saving", "recovering", "redoing", "holding",
    "suspended",
]  # fmt: skip


Phase = Literal["Pending", "Starting", "Training", "Recovering", "Holding", "Suspended", "Succeeded", "Failed"]


class GenerationSummary(Frozen):
    """Generation that trained."""

    number: int
    workers: int
    started_at_step: int
    reason: str
    formed_as: int | None = Field(
        default=None, description="Number under which its workers formed, if a rollback claimed this one"
    )


class Incident(Frozen):
    """Fault and its recovery. All seconds count from the fault; null: that point was not reached."""

    cause: str = Field(description="`WorkerLost`, `RankFailed`, `WorkerSilent`, `CheckpointCorrupt`, `LossSpike`, …")
    worker: int | None = None
    node: str = ""
    step: int = Field(description="Steps done at the fault")
    time: float = Field(default=0.0, description="Unix seconds of the fault")
    detected_seconds: float | None = None
    reformed_seconds: float | None = None
    restarted_seconds: float | None = None
    restored_seconds: float | None = None
    resumed_seconds: float | None = None
    steps_lost: int | None = None
    action: str = Field(default="", description="Action taken: `Reformed`, `RolledBack`, `Failed`, …")
    message: str = ""


class Goodput(Frozen):
    """Time by state. `ratio` is training over all time except suspended and queued."""

    ratio: float
    seconds: dict[GoodputState, float]


class CheckpointSummary(Frozen):
    """Summary of the run's checkpoints."""

    saved: int = 0
    latest_step: int | None = None
    latest_time: float | None = Field(default=None, description="Unix seconds at which the latest one was committed")
    stall_seconds: float = 0.0


class Condition(Frozen):
    """metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    observed_generation: int | None = None
    last_transition_time: str = ""


class NodeFailure(Frozen):
    """Worker failure that its node may have caused."""

    time: float = Field(description="Unix seconds")
    cause: str = Field(description="`OOMKilled`, `Error`, `Killed`, `WorkerSilent`, …")


class Suspect(Frozen):
    """Node on which workers failed or went silent."""

    node: str
    failures: tuple[NodeFailure, ...] = Field(default=(), description="Failures within `recovery.suspects.window`")
    silent_at: float | None = Field(default=None, description="Unix seconds at which all its workers were silent")
    quarantined_at: float | None = Field(
        default=None, description="Unix seconds at which a rule of the job quarantined it"
    )
    avoided: bool = Field(default=False, description="True: new workers prefer other nodes")


class Profile(Frozen):
    """Result of a profile request."""

    id: str = Field(description="Id of the request")
    rank: int
    first_step: int = 0
    last_step: int = 0
    location: str = Field(default="", description="Location of the trace; empty: no trace")
    bytes: int = 0
    message: str = Field(default="", description="Reason why there is no trace")


class Obstacle(Frozen):
    """External problem that blocks training until somebody fixes it."""

    reason: str = Field(description="CamelCase: `QuotaExceeded`, `StorageUnavailable`, …")
    message: str


class WorkerStatus(Frozen):
    """Worker as shown to users."""

    slot: int
    attempt: int
    state: str = Field(description="`Starting`, `Joined`, `Training`, `Leaving`, `Ended`, `Lost`")
    rank: int | None = None
    node: str = ""
    pids: dict[int, int] = Field(default_factory=dict[int, int], description="Global rank -> process id on its node")


class SlotMemory(Frozen):
    """History of a slot's pods."""

    slot: int
    attempt: int = Field(description="Highest attempt created; attempts are never reused")
    joined: bool = Field(default=False, description="True: that attempt has joined")
    counted: bool = Field(default=False, description="True: the failure of that attempt before it joined is counted")
    failures: int = Field(default=0, description="Consecutive attempts that ended before they joined")
    failed_at: float = Field(default=0.0, description="Unix seconds of the last such failure")
    spec_generation: int | None = Field(
        default=None, description="metadata.generation of the job that the pod was created from; null: unknown"
    )
    kept_from: tuple[str, ...] | None = Field(default=None, description="Nodes that the pod must avoid; null: unknown")


class Bookkeeping(Frozen):
    """Internal counters that a restarted operator continues from."""

    state: GoodputState = "queued"
    counted_until: float | None = Field(default=None, description="Unix seconds up to which goodput is counted")
    highest_step: int = Field(default=0, description="Highest step trained; steps above it are new")
    checkpoint_step: int = Field(
        default=0, description="Step of the latest progress: a checkpoint of a later step is progress"
    )
    restarts: tuple[float, ...] = Field(
        default=(), description="Unix seconds of the charged failures since the last progress"
    )
    program_failures: int = Field(default=0, description="Charged failures of the training program itself")
    last_failure: str = ""
    slots: tuple[SlotMemory, ...] = ()
    save_seconds: tuple[float, ...] = Field(default=(), description="Durations of the last saves")
    refused: Obstacle | None = Field(default=None, description="Reason why the cluster admits no more pods")
    ranks_wait: Obstacle | None = Field(default=None, description="Problem that the ranks of `generation` wait for")


class JobStatus(Frozen):
    """Status of the job, written by the operator."""

    phase: Phase = "Pending"
    reason: str = ""
    message: str = ""
    job_uid: str = ""
    observed_generation: int = Field(default=0, description="metadata.generation of the spec acted on last")
    generation: int = Field(default=0, description="Highest generation number")
    replicas: int = 0
    workers: tuple[WorkerStatus, ...] = ()
    selector: str = ""
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_device: float | None = None
    mfu: float | None = Field(
        default=None,
        description="Model FLOPs over the devices' peak, 0 to 1; null: the peak is unknown",
    )
    seconds_per_step: float | None = Field(
        default=None, description="Mean over the last steps, pauses for recovery included"
    )
    eta: str = Field(default="", description="Expected time of the last step, RFC 3339; empty: unknown")
    latest_checkpoint: str | None = None
    parameters: int | None = None
    unigram_loss: float | None = None
    validation_loss: dict[str, float] = Field(default_factory=dict[str, float])
    evaluation_metrics: dict[str, float] = Field(
        default_factory=dict[str, float], description="Latest results of the evaluation hook"
    )
    sample: str = Field(default="", description="Beginning of the texts sampled last, prompts included")
    skipped: tuple[StepRange, ...] = Field(default=(), description="Skipped steps of data")
    rollbacks: int = Field(default=0, description="Number of rollbacks after divergence")
    goodput: Goodput | None = None
    checkpoints: CheckpointSummary = CheckpointSummary()
    generations: tuple[GenerationSummary, ...] = ()
    incidents: tuple[Incident, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    profiles: tuple[Profile, ...] = Field(
        default=(), description="Results of the last profile requests, the latest last"
    )
    conditions: tuple[Condition, ...] = ()
    bookkeeping: Bookkeeping = Bookkeeping()
