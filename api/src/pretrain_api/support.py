"""What this version acts on: fields whose value is part of the format but not, or not yet, of the program."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pretrain_api.job import Elastic, PretrainJobSpec
from pretrain_api.layout import replica_processes
from pretrain_api.model import resolve
from pretrain_api.training import Training

_SEVERAL = "not there yet with tensor or pipeline parallelism: set parallelism.tensor and pipeline to 1"
_CUT = "not there yet with tensor parallelism: set parallelism.tensor to 1"


class Finding(NamedTuple):
    """A value that does not do what it says. `error`: the job is refused; `warning`: it runs as if it were absent."""

    severity: Literal["error", "warning"]
    path: str
    """As users write it, for example `spec.training.precision`."""
    message: str


def unsupported(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    """Every value of the spec that this version does not act on; errors first."""
    return (*training_errors(spec.training), *_checkpoint_errors(spec), *_warnings(spec))


def training_errors(training: Training) -> tuple[Finding, ...]:
    """What of it the training program does not do; it refuses the same."""
    at, model, parallelism = "spec.training", resolve(training.model), training.parallelism
    several, cut = replica_processes(parallelism) > 1, parallelism.tensor > 1
    imports = training.origin is not None and training.origin.hugging_face is not None
    found = (
        (training.precision == "fp8", "precision", "fp8 is not there yet: use bf16 or fp32"),
        (
            training.exact and parallelism.shard == "hybrid",
            "exact",
            "exact sums are not there yet for hybrid: set parallelism.shard to none or full, or exact to false",
        ),
        (several and training.exact, "exact", f"exact sums are {_SEVERAL}, or exact to false"),
        (several and model.dropout > 0, "model.dropout", f"dropout is {_SEVERAL}, or dropout to 0"),
        (several and training.compile, "compile", f"compiled blocks are {_SEVERAL}, or compile to false"),
        (several and imports, "from.huggingFace", f"weights of Hugging Face are {_SEVERAL} for the first run"),
        (cut and parallelism.shard != "none", "parallelism.shard", f"shards are {_CUT}, or shard to none"),
        (
            cut and training.activation_checkpointing != "none",
            "activationCheckpointing",
            f"it is {_CUT}, or this to none",
        ),
        (cut and training.loss.chunk is not None, "loss.chunk", f"chunks are {_CUT}, or leave them out"),
        (cut and model.norm == "post", "model.norm", f"post-norm is {_CUT}, or norm to pre"),
    )
    return tuple(Finding("error", f"{at}.{path}", message) for holds, path, message in found if holds)


def _checkpoint_errors(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    parallelism = spec.training.parallelism
    if spec.checkpoint.memory is None or (replica_processes(parallelism) == 1 and parallelism.shard != "hybrid"):
        return ()
    message = "not there yet with tensor or pipeline parallelism or hybrid shards: leave it out"
    return (Finding("error", "spec.checkpoint.memory", message),)


def _warnings(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    found = (
        (
            spec.workers.elastic.grow_cooldown != Elastic().grow_cooldown,
            "spec.workers.elastic.growCooldown",
            "a job does not grow beyond replicas by itself yet: raise replicas for that",
        ),
    )
    return tuple(Finding("warning", path, message) for holds, path, message in found if holds)
