"""Which modules the process is to have imported from which a worker's ranks are forked."""

from __future__ import annotations

from pretrain_api.job import PretrainJobSpec


def preloads(spec: PretrainJobSpec) -> tuple[str, ...]:
    """All that each of the job's ranks would have to import at its start otherwise."""
    wanted = (
        (True, "pretrain_trainer.preload"),
        (spec.checkpoint.storage.s3 is not None, "pretrain_trainer.preload_s3"),
        (spec.training.compile, "pretrain_trainer.preload_compile"),
    )
    return tuple(module for wants, module in wanted if wants)
