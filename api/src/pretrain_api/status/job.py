"""Status of a job: `.status` of the resource, and `status.json` of a local run."""

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
    """A generation that trained."""

    number: int
    workers: int
    started_at_step: int
    reason: str
    formed_as: int | None = Field(
        default=None, description="The number under which its workers met, where a rollback of theirs took this one"
    )


class Incident(Frozen):
    """A fault and how it was overcome. All seconds count from the fault; null: that point was not reached."""

    cause: str = Field(description="`WorkerLost`, `RankFailed`, `WorkerSilent`, `CheckpointCorrupt`, `LossSpike`, …")
    worker: int | None = None
    node: str = ""
    step: int = Field(description="Steps done when it happened")
    time: float = Field(default=0.0, description="Unix seconds of the fault")
    detected_seconds: float | None = None
    reformed_seconds: float | None = None
    restarted_seconds: float | None = None
    restored_seconds: float | None = None
    resumed_seconds: float | None = None
    steps_lost: int | None = None
    action: str = Field(default="", description="What was done: `Reformed`, `RolledBack`, `Failed`, …")
    message: str = ""


class Goodput(Frozen):
    """Where the time went. `ratio` is training over all but suspended and queued."""

    ratio: float
    seconds: dict[GoodputState, float]


class CheckpointSummary(Frozen):
    """Checkpoints of the run."""

    saved: int = 0
    latest_step: int | None = None
    latest_time: float | None = Field(default=None, description="Unix seconds at which that one came into force")
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
    """A failure of a worker that may be its node's fault."""

    time: float = Field(description="Unix seconds")
    cause: str = Field(description="`OOMKilled`, `Error`, `Killed`, `WorkerSilent`, …")


class Suspect(Frozen):
    """A node on which workers failed or fell silent."""

    node: str
    failures: tuple[NodeFailure, ...] = Field(default=(), description="Those within `recovery.suspects.window`")
    silent_at: float | None = Field(default=None, description="Unix seconds at which nothing there answered")
    quarantined_at: float | None = Field(default=None, description="Unix seconds at which a rule of the job said so")
    avoided: bool = Field(default=False, description="New workers rather go elsewhere")


class Profile(Frozen):
    """What became of a request for a profile."""

    id: str = Field(description="Of the request")
    rank: int
    first_step: int = 0
    last_step: int = 0
    location: str = Field(default="", description="Where the trace is; empty: there is none")
    bytes: int = 0
    message: str = Field(default="", description="Why there is none")


class Obstacle(Frozen):
    """What keeps workers from training until somebody mends it."""

    reason: str = Field(description="CamelCase: `QuotaExceeded`, `StorageUnavailable`, …")
    message: str


class WorkerStatus(Frozen):
    """One worker, for people."""

    slot: int
    attempt: int
    state: str = Field(description="`Starting`, `Joined`, `Training`, `Leaving`, `Ended`, `Lost`")
    rank: int | None = None
    node: str = ""
    pids: dict[int, int] = Field(default_factory=dict[int, int], description="Global rank -> process id on its node")


class SlotMemory(Frozen):
    """What is known of the pods that a slot ever had."""

    slot: int
    attempt: int = Field(description="Highest attempt ever created: none is used again")
    joined: bool = Field(default=False, description="That attempt has joined")
    counted: bool = Field(default=False, description="That attempt ended before it joined, which was counted")
    failures: int = Field(default=0, description="Attempts in a row that ended before they joined")
    failed_at: float = Field(default=0.0, description="Unix seconds of the last of them")
    spec_generation: int | None = Field(
        default=None, description="metadata.generation of the job that the pod was made from; null: not known"
    )
    kept_from: tuple[str, ...] | None = Field(
        default=None, description="Nodes that the pod must not be put on; null: not known"
    )


class Bookkeeping(Frozen):
    """What an operator that starts anew must know to go on counting; not meant for people."""

    state: GoodputState = "queued"
    counted_until: float | None = Field(default=None, description="Unix seconds up to which goodput is complete")
    highest_step: int = Field(default=0, description="Steps above it are trained for the first time")
    checkpoint_step: int = Field(default=0, description="A checkpoint of a later step is progress")
    restarts: tuple[float, ...] = Field(
        default=(), description="Unix seconds of the failures since the last progress that count"
    )
    program_failures: int = Field(default=0, description="Of which failures of the training program itself")
    last_failure: str = ""
    slots: tuple[SlotMemory, ...] = ()
    save_seconds: tuple[float, ...] = Field(default=(), description="How long the last saves took")
    refused: Obstacle | None = Field(default=None, description="Why the cluster takes no more pods")
    ranks_wait: Obstacle | None = Field(default=None, description="What the ranks of `generation` wait for")


class JobStatus(Frozen):
    """The job's status: the resource's `.status`, and `status.json` of a local run."""

    phase: Phase = "Pending"
    reason: str = ""
    message: str = ""
    job_uid: str = ""
    observed_generation: int = Field(default=0, description="metadata.generation of the spec that was acted on last")
    generation: int = Field(default=0, description="Highest generation number known")
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
        description="Model FLOPs over the devices' peak at this speed, 0 to 1; null: the peak is not known",
    )
    seconds_per_step: float | None = Field(
        default=None, description="Over the last steps, pauses for recovery included"
    )
    eta: str = Field(default="", description="When the last step will be done at this pace; empty: not known")
    latest_checkpoint: str | None = None
    parameters: int | None = None
    unigram_loss: float | None = None
    validation_loss: dict[str, float] = Field(default_factory=dict[str, float])
    evaluation_metrics: dict[str, float] = Field(
        default_factory=dict[str, float], description="What the evaluation hook returned last"
    )
    sample: str = Field(default="", description="The beginning of what the model wrote last, the prompts included")
    skipped: tuple[StepRange, ...] = Field(default=(), description="Steps of data that were passed over")
    rollbacks: int = Field(default=0, description="How often the loss diverged and an earlier state was gone back to")
    goodput: Goodput | None = None
    checkpoints: CheckpointSummary = CheckpointSummary()
    generations: tuple[GenerationSummary, ...] = ()
    incidents: tuple[Incident, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    profiles: tuple[Profile, ...] = Field(default=(), description="Of the last requests, the newest last")
    conditions: tuple[Condition, ...] = ()
    bookkeeping: Bookkeeping = Bookkeeping()
