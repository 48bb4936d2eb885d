"""`spec.training`: what is trained, on what, how long and how; every field with its unit, default and bounds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from pretrain_api.base import Spec
from pretrain_api.spec.model import Model, resolve
from pretrain_api.spec.quantities import MAX_TOKENS, TokenCount

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
MAX_STEPS = 10**9
MAX_SOURCES = 64
MAX_PROMPT = 10_000
MAX_METRICS = 32
"""Most that an evaluation hook may return."""
Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Beta = Annotated[float, Field(ge=0, lt=1)]
_LIST_BY_NAME: JsonDict = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


class Source(Spec):
    """A tokenised data source."""

    name: str = Field(pattern=NAME_PATTERN, max_length=63, description="Its name in reports; unique in its list")
    uri: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder with dataset.json: s3://…, file://…, or a path relative to the job file",
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="Share of the sequences, relative to the other weights"
    )


class Data(Spec):
    """The training mix."""

    tokenizer: str = Field(min_length=1, max_length=4096, description="URI of tokenizer.json (Hugging Face tokenizers)")
    sources: tuple[Source, ...] = Field(
        strict=False,
        min_length=1,
        max_length=MAX_SOURCES,
        description="A weighted mix",
        json_schema_extra=_LIST_BY_NAME,
    )

    mask_documents: bool = Field(
        default=False,
        description="Attention does not cross the ends of documents; positions count on from the sequence's beginning",
    )

    @model_validator(mode="after")
    def _unique(self) -> Self:
        _refuse_duplicates(self.sources)
        return self


class Batch(Spec):
    """The global batch: the same at any number of workers."""

    sequences: int = Field(default=64, ge=1, le=10**7, description="Sequences in a step, over all workers")
    micro_batch: int = Field(
        default=8, ge=1, le=10**7, description="Sequences computed together; never split, so it fixes the numerics"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.sequences % self.micro_batch:
            raise ValueError(
                f"microBatch ({self.micro_batch}) does not divide sequences ({self.sequences}): choose a divisor"
            )
        return self


class Loss(Spec):
    """What is minimised: cross-entropy. Reported losses are that alone."""

    z_loss: float = Field(
        default=0.0, ge=0, le=1, description="Factor of the squared log of the softmax's denominator (PaLM: 1e-4)"
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        le=2**31,
        description="Targets whose logits are in memory at once, computed again in backward; absent: a micro-batch's",
    )


class Optimizer(Spec):
    """The optimizer. Weight decay is decoupled and applies to matrices only."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="Update rule")
    learning_rate: float = Field(default=6e-4, gt=0, description="Peak learning rate")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled: multiplied by the learning rate")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95),
        strict=False,
        description="Decay of the two moments, each in [0, 1); sgd uses the first as momentum",
    )
    epsilon: float = Field(default=1e-8, gt=0, description="Added to adamw's denominator")
    clip: float | None = Field(default=1.0, gt=0, description="Global gradient norm; null: no clipping")


class Schedule(Spec):
    """Learning rate by step: linear warm-up, then the kind's decay to `minRatio` of the peak at the last step.

    Lengths are in steps or in tokens, each as it suits: those in tokens stay when the batch or the context changes.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(default="cosine", description="Form of the decay")
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS, description="Steps of linear warm-up from zero")
    warmup_tokens: TokenCount | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Or tokens of it, for example 500M; absent: warmupSteps"
    )
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="The last learning rate over the peak")
    decay_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="wsd: length of the last decay; absent: a tenth of all steps"
    )
    decay_tokens: TokenCount | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Or tokens of it, for example 2B; absent: decaySteps"
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
    """How the model and its state are laid over the processes."""

    shard: Literal["none", "full", "hybrid"] = Field(
        default="none",
        description="none: plain data parallel; full: FSDP2; hybrid: FSDP2 within, replicas between workers",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Processes that share each matrix and sequence; divides heads, kvHeads, hidden and context",
    )
    pipeline: int = Field(default=1, ge=1, le=1000, description="Pipeline stages; divides layers")


class Evaluation(Spec):
    """Validation during training, the same at any number of workers."""

    every: int = Field(
        default=500, ge=1, le=MAX_STEPS, description="Steps between evaluations; there is one at the end as well"
    )
    sequences: int = Field(
        default=64, ge=1, le=10**7, description="Sequences of each source that are evaluated, the first ones"
    )
    sources: tuple[Source, ...] = Field(
        strict=False,
        min_length=1,
        max_length=MAX_SOURCES,
        description="Held-out sources; their weights are not used",
        json_schema_extra=_LIST_BY_NAME,
    )
    hook: str | None = Field(
        default=None,
        max_length=4096,
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*|.+[.]py):[A-Za-z_][A-Za-z0-9_]*$",
        description="An evaluation of your own, called with the others: package.module:function, or a file.py:function "
        "(relative to the job file in local runs, absolute in the pods), importable where the trainer runs",
    )

    @property
    def hook_file(self) -> str | None:
        """The file that the hook is in, where it is given by that."""
        where = (self.hook or "").rpartition(":")[0]
        return where if where.endswith(".py") else None

    @model_validator(mode="after")
    def _unique(self) -> Self:
        _refuse_duplicates(self.sources)
        return self


class Sampling(Spec):
    """Texts that the model writes: at the end, and on the way where that is wished."""

    every: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Steps between them; absent: at the end only"
    )
    prompt: str = Field(default="", max_length=MAX_PROMPT, description="Beginning of the text")
    prompts: tuple[Prompt, ...] = Field(
        default=(), strict=False, max_length=16, description="Or the beginnings of several texts"
    )
    tokens: int = Field(default=120, ge=1, le=100_000, description="Tokens to add")
    temperature: float = Field(default=0.8, gt=0, le=100, description="1: as trained; lower: safer")

    @property
    def beginnings(self) -> tuple[str, ...]:
        """Of all texts."""
        return self.prompts or (self.prompt,)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.prompt and self.prompts:
            raise ValueError("give prompt or prompts, not both")
        return self


class From(Spec):
    """Where the first weights come from. Steps, tokens and data begin anew; exactly one of run and huggingFace."""

    run: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Another run's checkpoints, what its checkpoint.storage names: s3://…, file://…, or a path "
        "relative to the job file",
    )
    step: int | None = Field(default=None, ge=0, le=MAX_STEPS, description="That run's step; absent: the newest")
    optimizer: bool = Field(
        default=False, description="Take over what that run's optimizer keeps as well; needs the same optimizer.kind"
    )
    hugging_face: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="A folder in the format of Hugging Face, with safetensors: s3://…, file://…, or a path relative to "
        "the job file",
    )

    @property
    def uri(self) -> str:
        """The one that is given."""
        return self.run or self.hugging_face or ""

    @property
    def field(self) -> str:
        """Its path in the job."""
        return f"training.from.{'run' if self.run is not None else 'huggingFace'}"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.run is None) == (self.hugging_face is None):
            raise ValueError("give exactly one of run and huggingFace")
        if self.run is None and (self.step is not None or self.optimizer):
            raise ValueError("step and optimizer are for run: leave them out")
        return self


class Training(Spec):
    """What is trained, on what, how long and how."""

    model: Model = Field(description="The network")
    origin: From | None = Field(
        default=None, alias="from", description="Where the first weights come from; absent: drawn from the seed"
    )
    data: Data = Field(description="What it learns from")
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Optimizer updates")
    tokens: TokenCount | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Or tokens, for example 10B; rounded up to steps"
    )
    batch: Batch = Batch()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        default="bf16", description="Of matrix products; parameters and optimizer state are fp32"
    )
    parallelism: Parallelism = Parallelism()
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What is computed again in backward to save memory: nothing, all but matrix products and "
        "attention, or all of a block",
    )
    compile: bool = Field(default=False, description="Compile blocks with torch.compile; needs a C++ compiler")
    evaluation: Evaluation | None = Field(
        default=None, description="Losses of held-out sources while it trains; absent: none"
    )
    sampling: Sampling | None = Field(default=None, description="Texts that the model writes; absent: none")
    seed: int = Field(default=1, ge=0, lt=2**31, description="Of initialisation, data order and dropout")
    exact: bool = Field(default=False, description="Bit-equal at any number of workers, at a cost of step time")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer update sees, at any number of workers."""
        return self.batch.sequences * resolve(self.model).context

    @property
    def total_steps(self) -> int:
        """Optimizer updates until the end, from `steps` or `tokens`."""
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.tokens_per_step)

    @property
    def warmup_length(self) -> float:
        """Steps of the warm-up; of one in tokens it may end within a step."""
        tokens = self.schedule.warmup_tokens
        return self.schedule.warmup_steps if tokens is None else tokens / self.tokens_per_step

    @property
    def decay_length(self) -> float | None:
        """Steps of the last decay, likewise; None: not given."""
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


def _refuse_duplicates(sources: tuple[Source, ...]) -> None:
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources: the name {twice[0]!r} is there twice; give each source a name of its own")
