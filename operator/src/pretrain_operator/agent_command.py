"""Command-line arguments of agents, in pods and in local processes."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_api.spec.job import PretrainJobSpec


def agent_arguments(options: Mapping[str, object], spec: PretrainJobSpec) -> list[str]:
    """Return the options and the modules to preload into the fork server, which every rank would import otherwise."""
    preloads = (
        (True, "pretrain_trainer.preload"),
        (spec.checkpoint.storage.s3 is not None, "pretrain_trainer.preload_s3"),
        (spec.training.compile, "pretrain_trainer.preload_compile"),
    )
    chosen = [("--preload", module) for needed, module in preloads if needed]
    return [str(part) for option in (*options.items(), *chosen) for part in option]
