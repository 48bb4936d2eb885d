"""Optimizers: AdamW or SGD, with decoupled weight decay on matrices only (as in nanoGPT)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pretrain_api.spec.training import Optimizer as OptimizerConfig

VECTOR = 16
"""fp32 numbers in the widest vector of a CPU (AVX-512)."""


class DecoupledSgd(torch.optim.SGD):
    """SGD with momentum and decoupled weight decay: it shrinks the weights directly, not through the momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decay, then descend."""
        for group in self.param_groups:
            if group["decay"]:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["decay"])
        super().step(closure)


def build_optimizer(model: nn.Module, config: OptimizerConfig, exact: bool = False) -> torch.optim.Optimizer:
    """Build the configured optimizer. Its learning rate is set before each step, see `set_learning_rate`.

    With `exact` an update has the same bits whichever part of a parameter a rank holds.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    if config.kind == "sgd":
        groups = [{"params": matrices, "decay": config.weight_decay}, {"params": vectors, "decay": 0.0}]
        return DecoupledSgd(groups, lr=config.learning_rate, momentum=config.betas[0])
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if exact:
        groups = [part for group in groups for part in _without_tails(group)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def _without_tails(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Restrict fused updates to parameters whose rows, the units of sharding, fill whole vectors of the CPU.

    torch's fused kernel rounds the elements after a shard's last whole vector differently (torch 2.13, AVX2).
    """
    whole = [p for p in group["params"] if p.dim() >= 2 and math.prod(p.shape[1:]) % VECTOR == 0]
    chosen = {id(parameter) for parameter in whole}
    rest = [p for p in group["params"] if id(p) not in chosen]
    parts = [group | {"params": whole}, group | {"params": rest, "fused": False, "foreach": False}]
    return [part for part in parts if part["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
