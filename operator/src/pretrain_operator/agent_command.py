"""What the command lines of agents have in common, in pods and on one machine."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_api.spec.job import PretrainJobSpec


def agent_arguments(options: Mapping[str, object], spec: PretrainJobSpec) -> list[str]:
    """The options, and the modules that the process is to have imported from which the job's ranks are forked: all that
    each of them would have to import at its start otherwise."""
    wanted = (
        (True, "pretrain_trainer.preload"),
        (spec.checkpoint.storage.s3 is not None, "pretrain_trainer.preload_s3"),
        (spec.training.compile, "pretrain_trainer.preload_compile"),
    )
    preloads = [("--preload", module) for wants, module in wanted if wants]
    return [str(part) for option in (*options.items(), *preloads) for part in option]
