"""`spec.training`: every field with its unit, default and bounds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain_api.base import Spec
from pretrain_api.spec.data import Data, Evaluation, Sampling
from pretrain_api.spec.model import Model, resolve
from pretrain_api.spec.quantities import MAX_STEPS, MAX_TOKENS, TokenCount

Beta = Annotated[float, Field(ge=0, lt=1)]


class Batch(Spec):
    """Global batch, the same at any number of workers."""

    sequences: int = Field(default=64, ge=1, le=10**7, description="Sequences in a step, over all workers")
    micro_batch: int = Field(
        default=8, ge=1, le=10**7, description="Sequences computed together; never split, so results depend on it"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.sequences % self.micro_batch:
            raise ValueError(
                f"microBatch ({self.micro_batch}) does not divide sequences ({self.sequences}): choose a divisor"
            )
        return self


class Loss(Spec):
    """Training objective: cross-entropy, with an optional z-loss. Reported losses are cross-entropy only."""

    z_loss: float = Field(
        default=0.0, ge=0, le=1, description="Factor on the squared log of the softmax denominator (PaLM: 1e-4)"
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        le=2**31,
        description="Targets whose logits are in memory at once, recomputed in backward; absent: all of a micro-batch",
    )


class Optimizer(Spec):
    """Optimizer. Weight decay is decoupled and applies to matrices only."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="Update rule")
    learning_rate: float = Field(default=6e-4, gt=0, description="Peak learning rate")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay, multiplied by the learning rate"
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95),
        strict=False,
        description="Decay rates of the two moments, each in [0, 1); sgd uses the first as momentum",
    )
    epsilon: float = Field(default=1e-8, gt=0, description="Term added to adamw's denominator")
    clip: float | None = Field(default=1.0, gt=0, description="Maximum global gradient norm; null: no clipping")


class Schedule(Spec):
    """Learning rate by step: linear warm-up, then the kind's decay to `minRatio` of the peak at the last step.

    Lengths are in steps or in tokens. Lengths in tokens do not depend on the batch or the context.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(default="cosine", description="Shape of the decay")
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS, description="Steps of linear warm-up from zero")
    warmup_tokens: TokenCount | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Length of the warm-up in tokens, for example 500M; absent: warmupSteps",
    )
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="Last learning rate over the peak")
    decay_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="wsd: steps of the final decay; absent: a tenth of all steps"
    )
    decay_tokens: TokenCount | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="wsd: length of the final decay in tokens, for example 2B; absent: decaySteps",
    )

    @model_validator(mode="after")
    def _decay(self) -> Self:
        for name, given in (("decaySteps", self.decay_steps), ("decayTokens", self.decay_tokens)):
            if given is not None and self.kind != "wsd":
                raise ValueError(f"{name} is for kind wsd, not {self.kind}: leave it out, or set kind to wsd")
        return self

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.warmup_steps and self.warmup_tokens is not None:
            raise ValueError("give warmupSteps or warmupTokens, not both")
        if self.decay_steps is not None and self.decay_tokens is not None:
            raise ValueError("give decaySteps or decayTokens, not both")
        return self


class Parallelism(Spec):
    """Distribution of the model and its state over the processes."""

    shard: Literal["none", "full", "hybrid"] = Field(
        default="none",
        description="none: data parallel; full: FSDP2; hybrid: FSDP2 within workers, replicas between them",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Tensor-parallel processes; divides heads, kvHeads, hidden and context",
    )
    pipeline: int = Field(default=1, ge=1, le=1000, description="Pipeline stages; divides layers")


class From(Spec):
    """Source of the initial weights: exactly one of run and huggingFace. Steps, tokens and data start from 0."""

    run: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Checkpoints of another run, as named by its checkpoint.storage: s3://…, file://…, or a path "
        "relative to the job file",
    )
    step: int | None = Field(default=None, ge=0, le=MAX_STEPS, description="Step of that run; absent: the latest")
    optimizer: bool = Field(
        default=False, description="Restore that run's optimizer state too; requires the same optimizer.kind"
    )
    hugging_face: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Folder in Hugging Face format, with safetensors: s3://…, file://…, or a path relative to "
        "the job file",
    )

    @property
    def uri(self) -> str:
        """URI of the source."""
        return self.run or self.hugging_face or ""

    @property
    def field(self) -> str:
        """Path of the field in the job."""
        return f"training.from.{'run' if self.run is not None else 'huggingFace'}"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.run is None) == (self.hugging_face is None):
            raise ValueError("give exactly one of run and huggingFace")
        if self.run is None and (self.step is not None or self.optimizer):
            raise ValueError("step and optimizer are for run: leave them out")
        return self


class Training(Spec):
    """Model, data, length and method of the training."""

    model: Model = Field(description="Model architecture")
    origin: From | None = Field(
        default=None, alias="from", description="Source of the initial weights; absent: drawn from the seed"
    )
    data: Data = Field(description="Training data")
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Number of optimizer updates")
    tokens: TokenCount | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Tokens to train on, for example 10B; rounded up to steps"
    )
    batch: Batch = Batch()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        default="bf16", description="Precision of matrix products; parameters and optimizer state are fp32"
    )
    parallelism: Parallelism = Parallelism()
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Recomputation in backward to save memory; none: nothing, selective: all but matrix products and "
        "attention, full: whole blocks",
    )
    compile: bool = Field(default=False, description="Compile blocks with torch.compile; requires a C++ compiler")
    evaluation: Evaluation | None = Field(default=None, description="Evaluation on held-out sources; absent: none")
    sampling: Sampling | None = Field(default=None, description="Texts sampled from the model; absent: none")
    seed: int = Field(default=1, ge=0, lt=2**31, description="Seed of initialisation, data order and dropout")
    exact: bool = Field(default=False, description="Bit-equal results at any number of workers, for slower steps")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update, at any number of workers."""
        return self.batch.sequences * resolve(self.model).context

    @property
    def total_steps(self) -> int:
        """Number of optimizer updates, from `steps` or `tokens`."""
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.tokens_per_step)

    @property
    def warmup_length(self) -> float:
        """Steps of the warm-up; fractional if given in tokens."""
        tokens = self.schedule.warmup_tokens
        return self.schedule.warmup_steps if tokens is None else tokens / self.tokens_per_step

    @property
    def decay_length(self) -> float | None:
        """Steps of the final decay, likewise; None: not given."""
        tokens = self.schedule.decay_tokens
        return self.schedule.decay_steps if tokens is None else tokens / self.tokens_per_step

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        steps, warmup, decay = self.total_steps, self.warmup_length, self.decay_length or 0
        in_tokens = self.schedule.warmup_tokens is not None
        name = f"schedule.{'warmupTokens' if in_tokens else 'warmupSteps'}"
        if warmup > steps:
            raise ValueError(
                f"{name} ({warmup:g}{' steps' * in_tokens}) is more than all steps ({steps}): lower it, or train longer"
            )
        if warmup + decay > steps:
            last = "decayTokens" if self.schedule.decay_tokens is not None else "decaySteps"
            raise ValueError(
                f"{name} + schedule.{last} ({warmup:g} + {decay:g}{' steps' * (last == 'decayTokens' or in_tokens)}) "
                f"is more than all steps ({steps}): lower one of them, or train longer"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        model, tensor, pipeline = resolve(self.model), self.parallelism.tensor, self.parallelism.pipeline
        cut = {"heads": model.heads, "kvHeads": model.kv_heads, "hidden": model.hidden, "context": model.context}
        for name, number in cut.items():
            if number % tensor:
                raise ValueError(
                    f"parallelism.tensor ({tensor}) does not divide model.{name} ({number}): choose a divisor"
                )
        if model.layers % pipeline:
            raise ValueError(
                f"parallelism.pipeline ({pipeline}) does not divide model.layers ({model.layers}): choose a divisor"
            )
        return self
