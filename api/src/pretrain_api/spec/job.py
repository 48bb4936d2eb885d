"""The PretrainJob resource: what a user writes, every field with its unit, default and bounds."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pretrain_api.base import Spec
from pretrain_api.spec.quantities import Duration, PositiveDuration
from pretrain_api.spec.replicas import misfit
from pretrain_api.spec.training import MAX_STEPS, Training

API_VERSION = "pretrain.dev/v1alpha1"
KIND = "PretrainJob"
MAX_WORKERS = 10_000


class Elastic(Spec):
    """Between how many workers the job may run, and how it gets there."""

    min: int = Field(default=1, ge=1, le=MAX_WORKERS, description="Fewest workers that train; with fewer the job waits")
    max: int | None = Field(default=None, ge=1, le=MAX_WORKERS, description="Most workers; absent: `replicas`")
    shrink_after: Duration = Field(
        default=timedelta(0), description="How long to wait for a lost worker's replacement before going on without it"
    )
    grow_cooldown: Duration = Field(
        default=timedelta(minutes=5),
        description="Time between growths beyond `replicas`; never delays a return to `replicas`",
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
        description="The trainer's image; not used by local runs",
    )
    replicas: int = Field(default=1, ge=1, le=MAX_WORKERS, description="Workers wanted")
    elastic: Elastic = Elastic()
    spares: int = Field(
        default=0, ge=0, le=1000, description="Warm workers beyond `replicas`: joined, waiting, in no generation"
    )
    processes_per_worker: int | None = Field(
        default=None, ge=1, le=64, description="Training processes in each worker; absent: the GPUs of the pod, or 1"
    )
    template: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="PodTemplateSpec, preserved as written",
        json_schema_extra={"default": {}, "x-kubernetes-preserve-unknown-fields": True},
    )

    @property
    def max(self) -> int:
        """Most workers that may train."""
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
    """An S3 bucket that honours conditional writes."""

    bucket: str = Field(
        min_length=3, max_length=63, pattern=r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$", description="Name of the bucket"
    )
    prefix: str = Field(
        default="",
        max_length=512,
        pattern=r"^([^/]+(/[^/]+)*)?$",
        description="Folder of this run's checkpoints in the bucket, without a slash at either end",
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
        description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; local runs use the environment",
    )


class Storage(Spec):
    """Where checkpoints live: exactly one of the two."""

    s3: S3Storage | None = None
    path: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="A folder: relative to --out for local runs, a shared volume on Kubernetes",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.s3 is None) == (self.path is None):
            raise ValueError("give exactly one of s3 and path")
        return self


class Interval(Spec):
    """Time between checkpoints: exactly one of the two."""

    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Optimizer updates between checkpoints")
    duration: PositiveDuration | None = Field(default=None, description="Time between checkpoints")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.duration is None):
            raise ValueError("give exactly one of steps and duration")
        return self


PinnedStep = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class Retain(Spec):
    """Which checkpoints stay. At least two and all that the line needs always do."""

    last: int = Field(default=3, ge=2, le=10_000, description="The newest ones")
    every_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="And those at multiples of this step; absent: none"
    )
    pin: tuple[PinnedStep, ...] = Field(
        default=(), strict=False, max_length=1000, description="And those of these very steps, where there is one"
    )


class Memory(Spec):
    """Checkpoints in the memory of the pod."""

    every_steps: int = Field(default=50, ge=1, le=MAX_STEPS, description="Optimizer updates between them")


class Checkpoint(Spec):
    """Checkpoints."""

    storage: Storage = Field(description="Where they live: exactly one of s3 and path")
    interval: Interval | None = Field(
        default=None, description="How often; absent: every 50 steps, less often where a save is measured to be slow"
    )
    retain: Retain = Retain()
    memory: Memory | None = Field(
        default=None, description="States in the memory of workers beside those in the storage; absent: none"
    )


class Budget(Spec):
    """How often the job may be restarted. Every new checkpoint refunds it."""

    restarts: int = Field(
        default=10, ge=0, le=10_000, description="Restarts within `window` and since the last new checkpoint"
    )
    window: PositiveDuration = Field(default=timedelta(hours=1), description="Time over which restarts are counted")
    without_progress: int = Field(
        default=3,
        ge=1,
        le=10_000,
        description="Failures of the training program in a row without a new checkpoint between them",
    )


ExitStatus = Annotated[int, Field(ge=-64, le=255)]
"""Negative: killed by that signal."""


class Rule(Spec):
    """What to do on a failure: the first rule that matches wins."""

    on_exit_codes: tuple[ExitStatus, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        max_length=64,
        description="Exit codes of the training program; negative: killed by that signal",
    )
    on_reason: str | None = Field(
        default=None, min_length=1, max_length=256, description="A failure's reason, for example OutOfMemory"
    )
    on_log: str | None = Field(
        default=None, min_length=1, max_length=1024, description="Regular expression searched in the failure's message"
    )
    action: Literal["Restart", "Ignore", "Fail", "Quarantine"] = Field(description="What is done")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(item is not None for item in (self.on_exit_codes, self.on_reason, self.on_log)) != 1:
            raise ValueError("give exactly one of onExitCodes, onReason and onLog")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.on_log or "")
        except re.error as error:
            raise ValueError(f"onLog {self.on_log!r} is no regular expression: {error}") from error
        return self


class Hang(Spec):
    """When a job whose workers all answer counts as hanging."""

    timeout: PositiveDuration = Field(description="Time without a step")


class Divergence(Spec):
    """What to do when the loss or the gradient norm spikes or is not finite."""

    action: Literal["Rollback", "Skip", "Warn"] = Field(
        default="Rollback",
        description="Rollback: go back to a checkpoint from before it and pass over data; Skip: drop the update of "
        "every such step; Warn: only say so, though an update that is not finite is dropped all the same",
    )
    threshold: float = Field(
        default=5.0,
        ge=2,
        le=1000,
        description="What is a spike: so many standard deviations of the noise above the latest losses or norms",
    )
    skip_steps: int = Field(
        default=100,
        ge=0,
        le=MAX_STEPS,
        description="Steps of data passed over after a rollback, a quarter of them before the spike; and the most "
        "updates in a row that Skip and Warn drop before the job fails",
    )
    learning_rate_factor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Multiplies the learning rate after a rollback, until skipSteps steps past the spike",
    )
    max_rollbacks: int = Field(
        default=3, ge=0, le=1000, description="Rollbacks of the job in all; with more it fails with reason Diverged"
    )


class Suspects(Spec):
    """When a node is avoided."""

    failures: int = Field(default=2, ge=1, le=1000, description="Failures on one node within `window`")
    window: PositiveDuration = Field(default=timedelta(hours=24), description="Time over which failures are counted")


class Recovery(Spec):
    """What happens after faults."""

    budget: Budget = Budget()
    rules: tuple[Rule, ...] = Field(
        default=(), strict=False, max_length=64, description="The first that matches a failure wins; none: restart"
    )
    hang: Hang | None = Field(
        default=None, description="When ranks that do no step are restarted; absent: learned from the step times"
    )
    divergence: Divergence = Divergence()
    suspects: Suspects = Suspects()


class PretrainJobSpec(Spec):
    """The wanted state."""

    suspend: bool = Field(default=False, description="Take a checkpoint and let all workers go; false: go on")
    workers: Workers = Workers()
    training: Training = Field(description="What is trained, on what, how long and how")
    checkpoint: Checkpoint = Field(description="Where checkpoints live, how often they are taken, which stay")
    recovery: Recovery = Recovery()
    ttl_after_finished: Duration | None = Field(
        default=None, description="Delete the job so long after its end; absent: it stays"
    )

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        processes = self.workers.processes_per_worker
        if processes is None and self.workers.template:
            return self  # it may ask for GPUs, which whoever makes the pods counts
        if problem := misfit(self.training.parallelism, self.workers.replicas, processes or 1):
            raise ValueError(f"workers.replicas: {problem}")
        return self


class Metadata(Spec):
    """The part of Kubernetes' ObjectMeta that matters here; the rest is left alone."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=40,
        description="The job's name; pods are named after it, hence its length",
    )
    namespace: str = ""
    uid: str = ""
    generation: int = 0


class PretrainJob(Spec):
    """A pre-training run."""

    api_version: Literal["pretrain.dev/v1alpha1"]
    kind: Literal["PretrainJob"]
    metadata: Metadata
    spec: PretrainJobSpec
    status: dict[str, Any] | None = Field(default=None, exclude=True)
