"""Values that the format allows and this version does not support."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pretrain_api.spec.job import Elastic, PretrainJobSpec
from pretrain_api.spec.replicas import replica_processes
from pretrain_api.spec.training import Training

_EXACT_SUMS = (
    "exact sums do not support tensor or pipeline parallelism yet: set parallelism.tensor and pipeline to 1, "
    "or exact to false"
)
_COMPILED_PARTS = (
    "compiled blocks do not support tensor parallelism yet: set parallelism.tensor to 1, or compile to false"
)


class Finding(NamedTuple):
    """Unsupported value. `error`: the job is refused; `warning`: the value is ignored."""

    severity: Literal["error", "warning"]
    path: str
    """Field as users write it, for example `spec.training.precision`."""
    message: str


def unsupported(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    """List all unsupported values of the spec, errors first."""
    return (*training_errors(spec.training), *_warnings(spec))


def training_errors(training: Training) -> tuple[Finding, ...]:
    """List the values that the training program does not support and refuses too."""
    at, several = "spec.training", replica_processes(training.parallelism) > 1
    found = (
        (training.precision == "fp8", "precision", "fp8 is not supported yet: use bf16 or fp32"),
        (several and training.exact, "exact", _EXACT_SUMS),
        (training.parallelism.tensor > 1 and training.compile, "compile", _COMPILED_PARTS),
    )
    return tuple(Finding("error", f"{at}.{path}", message) for holds, path, message in found if holds)


def _warnings(spec: PretrainJobSpec) -> tuple[Finding, ...]:
    found = (
        (
            spec.workers.elastic.grow_cooldown != Elastic().grow_cooldown,
            "spec.workers.elastic.growCooldown",
            "has no effect: a job does not grow beyond replicas by itself yet; raise replicas instead",
        ),
    )
    return tuple(Finding("warning", path, message) for holds, path, message in found if holds)
