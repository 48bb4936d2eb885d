"""The optimizer: AdamW or SGD, with decoupled weight decay on matrices only (as nanoGPT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain_api.training import Optimizer as OptimizerConfig


class DecoupledSgd(torch.optim.SGD):
    """SGD with momentum whose decay shrinks the weights directly, not by way of the gradient and its momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update: decay, then descent."""
        for group in self.param_groups:
            if group["decay"]:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["decay"])
        super().step(closure)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer. Its learning rate is set before each step, see `set_learning_rate`."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    if config.kind == "sgd":
        groups = [{"params": matrices, "decay": config.weight_decay}, {"params": vectors, "decay": 0.0}]
        return DecoupledSgd(groups, lr=config.learning_rate, momentum=config.betas[0])
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
