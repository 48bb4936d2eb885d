"""A training program with a callback: `python training_callback.py CONFIG.json`, alone or under torchrun."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist

from pretrain_trainer.__main__ import main
from pretrain_trainer.loop.callbacks import Callback, CompletedStep
from pretrain_trainer.loop.setup import PreparedRun


class WeightNorm(Callback):
    """Prints the norm of the weights every 100 steps."""

    collective: ClassVar[bool] = True
    """`after_step` sums over the ranks."""

    def __init__(self, run: PreparedRun) -> None:
        self._model = run.evaluated.model
        self._ranks = run.ranks

    def after_step(self, completed: CompletedStep) -> None:
        """Average the norm over the ranks, which agree with plain data parallelism."""
        if completed.progress.step % 100 and not completed.last:
            return
        squares = [parameter.detach().square().sum() for parameter in self._model.parameters()]
        norm = torch.stack(squares).sum().sqrt()
        dist.all_reduce(norm)
        if self._ranks.first:
            print(f"step {completed.progress.step}: norm {norm.item() / self._ranks.world_size:.4f}", flush=True)


def callbacks(run: PreparedRun) -> Sequence[Callback]:
    """Create the callbacks of this rank."""
    return [WeightNorm(run)]


if __name__ == "__main__":
    main(callbacks)
