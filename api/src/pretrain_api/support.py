"""What this version acts on: fields whose value is part of the format but not, or not yet, of the program."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pretrain_api.job import Divergence, Elastic, PretrainJobSpec
from pretrain_api.layout import replica_processes
from pretrain_api.model import resolve
from pretrain_api.training import Training


class Finding(NamedTuple):
    """A value that does not do what it says. `error`: the job is refused; `warning`: it runs as if it were absent."""

    severity: Literal["error", "warning"]
    path: str
    """As users write it, for example `spec.training.precision`."""
    message: str


def unsupported(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    """Every value of the spec that this version does not act on; errors first."""
    return (*_training_errors(spec.training), *_warnings(spec))


def _training_errors(training: Training) -> tuple[Finding, ...]:
    at = "spec.training"
    parallelism = training.parallelism
    found = (
        (training.precision == "fp8", f"{at}.precision", "fp8 is not there yet: use bf16 or fp32"),
        (
            resolve(training.model).dropout > 0 and replica_processes(parallelism) > 1,
            f"{at}.model.dropout",
            "dropout is not there yet with tensor or pipeline parallelism: leave it out, or set both to 1",
        ),
        (
            training.exact and parallelism.shard == "hybrid",
            f"{at}.exact",
            "exact sums are not there yet for hybrid: set parallelism.shard to none or full, or exact to false",
        ),
        (
            training.exact and replica_processes(parallelism) > 1,
            f"{at}.exact",
            "exact sums are not there yet with tensor or pipeline parallelism: set both to 1, or exact to false",
        ),
    )
    return tuple(Finding("error", path, message) for holds, path, message in found if holds)


def _warnings(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    found = (
        (
            spec.recovery.divergence != Divergence(),
            "spec.recovery.divergence",
            "divergence is not watched yet: the loss may spike unnoticed",
        ),
        (
            spec.workers.elastic.grow_cooldown != Elastic().grow_cooldown,
            "spec.workers.elastic.growCooldown",
            "a job does not grow beyond replicas by itself yet: raise replicas for that",
        ),
    )
    return tuple(Finding("warning", path, message) for holds, path, message in found if holds)
