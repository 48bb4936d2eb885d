"""What this version acts on: fields whose value is part of the format but not, or not yet, of the program."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pretrain_api.spec.job import Elastic, PretrainJobSpec
from pretrain_api.spec.replicas import replica_processes
from pretrain_api.spec.training import Training

_EXACT_SUMS = (
    "exact sums are not there yet with tensor or pipeline parallelism: set parallelism.tensor and pipeline to 1, "
    "or exact to false"
)
_COMPILED_PARTS = (
    "compiled blocks are not there yet with tensor parallelism: set parallelism.tensor to 1, or compile to false"
)


class Finding(NamedTuple):
    """A value that does not do what it says. `error`: the job is refused; `warning`: it runs as if it were absent."""

    severity: Literal["error", "warning"]
    path: str
    """As users write it, for example `spec.training.precision`."""
    message: str


def unsupported(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    """Every value of the spec that this version does not act on; errors first."""
    return (*training_errors(spec.training), *_warnings(spec))


def training_errors(training: Training) -> tuple[Finding, ...]:
    """What of it the training program does not do; it refuses the same."""
    at, several = "spec.training", replica_processes(training.parallelism) > 1
    found = (
        (training.precision == "fp8", "precision", "fp8 is not there yet: use bf16 or fp32"),
        (several and training.exact, "exact", _EXACT_SUMS),
        (training.parallelism.tensor > 1 and training.compile, "compile", _COMPILED_PARTS),
    )
    return tuple(Finding("error", f"{at}.{path}", message) for holds, path, message in found if holds)


def _warnings(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    found = (
        (
            spec.workers.elastic.grow_cooldown != Elastic().grow_cooldown,
            "spec.workers.elastic.growCooldown",
            "a job does not grow beyond replicas by itself yet: raise replicas for that",
        ),
    )
    return tuple(Finding("warning", path, message) for holds, path, message in found if holds)
