"""The PretrainJob resource: every field with its unit, default and bounds."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pretrain_api.base import Spec
from pretrain_api.spec.patterns import MAX_PATTERN, InvalidPattern, compile_pattern
from pretrain_api.spec.quantities import MAX_STEPS, Duration, PositiveDuration
from pretrain_api.spec.replicas import misfit
from pretrain_api.spec.training import Training

API_VERSION = "pretrain.dev/v1alpha1"
KIND = "PretrainJob"
MAX_WORKERS = 10_000


class Elastic(Spec):
    """Bounds of the number of workers, and the rules for changing it."""

    min: int = Field(default=1, ge=1, le=MAX_WORKERS, description="Minimum number of workers; with fewer the job waits")
    max: int | None = Field(
        default=None, ge=1, le=MAX_WORKERS, description="Maximum number of workers; absent: `replicas`"
    )
    shrink_after: Duration = Field(
        default=timedelta(0),
        description="Time to wait for a lost worker's replacement before training resumes without it",
    )
    grow_cooldown: Duration = Field(
        default=timedelta(minutes=5),
        description="Minimum time between growths beyond `replicas`; never delays a return to `replicas`",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is greater than max ({self.max}): lower min or raise max")
        return self


class Workers(Spec):
    """The worker pods."""

    image: str = Field(
        default="pretrain-trainer:0.1.0",
        min_length=1,
        max_length=1024,
        description="Image of the trainer; ignored by local runs",
    )
    replicas: int = Field(default=1, ge=1, le=MAX_WORKERS, description="Desired number of workers")
    elastic: Elastic = Elastic()
    spares: int = Field(
        default=0, ge=0, le=1000, description="Warm workers beyond `replicas`: connected, but in no generation"
    )
    processes_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Training processes in each worker; absent: the pod's number of GPUs, or 1",
    )
    template: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="PodTemplateSpec of the worker pods, preserved as written",
        json_schema_extra={"default": {}, "x-kubernetes-preserve-unknown-fields": True},
    )

    @property
    def max(self) -> int:
        """Maximum number of workers."""
        return self.elastic.max if self.elastic.max is not None else max(self.replicas, self.elastic.min)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.replicas < self.elastic.min:
            raise ValueError(
                f"replicas ({self.replicas}) is less than elastic.min ({self.elastic.min}): "
                "raise replicas or lower elastic.min"
            )
        if self.replicas > self.max:
            raise ValueError(
                f"replicas ({self.replicas}) is greater than elastic.max ({self.max}): "
                "lower replicas or raise elastic.max"
            )
        return self


class S3Storage(Spec):
    """S3 bucket with support for conditional writes."""

    bucket: str = Field(
        min_length=3, max_length=63, pattern=r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$", description="Name of the bucket"
    )
    prefix: str = Field(
        default="",
        max_length=512,
        pattern=r"^([^/]+(/[^/]+)*)?$",
        description="Folder of this run's checkpoints in the bucket, without leading and trailing slash",
    )
    endpoint: str = Field(
        default="",
        max_length=2048,
        pattern=r"^(https?://[^/ ]+.*)?$",
        description="URL of the S3 service; empty: AWS",
    )
    region: str = Field(default="us-east-1", min_length=1, max_length=63, description="Region of the bucket")
    credentials_secret: str = Field(
        default="",
        max_length=253,
        pattern=r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?)?$",
        description="Name of a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; local runs use the environment",
    )


class Storage(Spec):
    """Storage of checkpoints: exactly one of s3 and path."""

    s3: S3Storage | None = None
    path: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Folder: relative to --out in local runs, on a shared volume on Kubernetes",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.s3 is None) == (self.path is None):
            raise ValueError("give exactly one of s3 and path")
        return self


class Interval(Spec):
    """Interval between checkpoints: exactly one of steps and duration."""

    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Optimizer updates between checkpoints")
    duration: PositiveDuration | None = Field(default=None, description="Time between checkpoints")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.duration is None):
            raise ValueError("give exactly one of steps and duration")
        return self


PinnedStep = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class Retain(Spec):
    """Retention of checkpoints. At least two, and all that the lineage needs, are always kept."""

    last: int = Field(default=3, ge=2, le=10_000, description="Number of latest checkpoints to keep")
    every_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Keep checkpoints at multiples of this step too; absent: none"
    )
    pin: tuple[PinnedStep, ...] = Field(
        default=(), strict=False, max_length=1000, description="Keep the checkpoints of these steps too"
    )


class Memory(Spec):
    """In-memory checkpoints of the workers."""

    every_steps: int = Field(
        default=50, ge=1, le=MAX_STEPS, description="Optimizer updates between in-memory checkpoints"
    )


class Checkpoint(Spec):
    """Checkpoint storage, interval and retention."""

    storage: Storage = Field(description="Storage of checkpoints: exactly one of s3 and path")
    interval: Interval | None = Field(
        default=None,
        description="Interval between checkpoints; absent: every 50 steps, or less often if saves are slow",
    )
    retain: Retain = Retain()
    memory: Memory | None = Field(
        default=None, description="In-memory checkpoints in addition to those in the storage; absent: none"
    )


class Budget(Spec):
    """Restart budget of the job. Every new checkpoint resets it."""

    restarts: int = Field(
        default=10, ge=0, le=10_000, description="Maximum restarts within `window` and since the last new checkpoint"
    )
    window: PositiveDuration = Field(default=timedelta(hours=1), description="Time window for counting restarts")
    without_progress: int = Field(
        default=3,
        ge=1,
        le=10_000,
        description="Maximum consecutive failures of the training program without a new checkpoint",
    )


ExitStatus = Annotated[int, Field(ge=-64, le=255)]
"""Negative: killed by that signal."""


class Rule(Spec):
    """Rule for a failure: the first matching rule applies."""

    on_exit_codes: tuple[ExitStatus, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        max_length=64,
        description="Exit codes of the training program; negative: killed by that signal",
    )
    on_reason: str | None = Field(
        default=None, min_length=1, max_length=256, description="Reason of the failure, for example OutOfMemory"
    )
    on_log: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_PATTERN,
        description="Regular expression searched in the failure's message; RE2: no lookaround, no backreferences",
    )
    action: Literal["Restart", "Ignore", "Fail", "Quarantine"] = Field(description="Action to take")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(item is not None for item in (self.on_exit_codes, self.on_reason, self.on_log)) != 1:
            raise ValueError("give exactly one of onExitCodes, onReason and onLog")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            compile_pattern(self.on_log or "")
        except InvalidPattern as error:
            raise ValueError(f"onLog {self.on_log!r} is not a valid regular expression: {error}") from error
        return self


class Hang(Spec):
    """Hang detection for a job whose workers are all responsive."""

    timeout: PositiveDuration = Field(description="Time without a step")


class Divergence(Spec):
    """Handling of divergence: spikes and non-finite values of the loss or the gradient norm."""

    action: Literal["Rollback", "Skip", "Warn"] = Field(
        default="Rollback",
        description="Rollback: restore a checkpoint from before the spike and skip data; Skip: drop the updates of "
        "diverged steps; Warn: report only, but still drop non-finite updates",
    )
    threshold: float = Field(
        default=5.0,
        ge=2,
        le=1000,
        description="Threshold of a spike: standard deviations of the noise above recent losses or norms",
    )
    skip_steps: int = Field(
        default=100,
        ge=0,
        le=MAX_STEPS,
        description="Steps of data to skip after a rollback, a quarter of them before the spike; also the maximum "
        "number of consecutive updates that Skip and Warn drop before the job fails",
    )
    learning_rate_factor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate after a rollback, until skipSteps steps past the spike",
    )
    max_rollbacks: int = Field(
        default=3, ge=0, le=1000, description="Maximum rollbacks of the job; one more fails it with reason Diverged"
    )


class Suspects(Spec):
    """Detection of suspect nodes, which new workers avoid."""

    failures: int = Field(
        default=2, ge=1, le=1000, description="Failures on one node within `window` that make it suspect"
    )
    window: PositiveDuration = Field(default=timedelta(hours=24), description="Time window for counting failures")


class Recovery(Spec):
    """Handling of faults."""

    budget: Budget = Budget()
    rules: tuple[Rule, ...] = Field(
        default=(),
        strict=False,
        max_length=64,
        description="Rules for failures: the first match applies; no match: restart",
    )
    hang: Hang | None = Field(
        default=None, description="Hang detection; absent: the timeout is learned from step times"
    )
    divergence: Divergence = Divergence()
    suspects: Suspects = Suspects()


class PretrainJobSpec(Spec):
    """Desired state of the job."""

    suspend: bool = Field(
        default=False, description="Take a checkpoint and release all workers; false: train or resume"
    )
    workers: Workers = Workers()
    training: Training = Field(description="Model, data, length and method of the training")
    checkpoint: Checkpoint = Field(description="Storage, interval and retention of checkpoints")
    recovery: Recovery = Recovery()
    ttl_after_finished: Duration | None = Field(
        default=None, description="Time after the job's end until it is deleted; absent: never"
    )

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        processes = self.workers.processes_per_worker
        if processes is None and self.workers.template:
            return self  # it may request GPUs, which the operator counts
        if problem := misfit(self.training.parallelism, self.workers.replicas, processes or 1):
            raise ValueError(f"workers.replicas: {problem}")
        return self


class Metadata(Spec):
    """Fields of Kubernetes' ObjectMeta that matter here; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=40,
        description="Name of the job; short, since pod names contain it",
    )
    namespace: str = ""
    uid: str = ""
    generation: int = 0


class PretrainJob(Spec):
    """Pre-training run."""

    api_version: Literal["pretrain.dev/v1alpha1"]
    kind: Literal["PretrainJob"]
    metadata: Metadata
    spec: PretrainJobSpec
    status: dict[str, Any] | None = Field(default=None, exclude=True)
