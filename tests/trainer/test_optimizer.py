"""Decay groups and updates."""

import pytest
import torch
from torch import nn

from pretrain_api.spec.training import Optimizer
from pretrain_trainer.models.optimizer import build_optimizer, set_learning_rate


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def updated(config: Optimizer, gradient: float, steps: int = 1) -> tuple[Tiny, Tiny]:
    torch.manual_seed(1)
    before, after = Tiny(), Tiny()
    after.load_state_dict(before.state_dict())
    optimizer = build_optimizer(after, config)
    for _ in range(steps):
        for parameter in after.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        set_learning_rate(optimizer, 0.5)
        optimizer.step()
    return before, after


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_decay_shrinks_matrices_and_nothing_else(kind: str) -> None:
    config = Optimizer.model_validate({"kind": kind, "learningRate": 0.1, "weightDecay": 0.4})
    before, after = updated(config, gradient=0.0)

    for name, parameter in after.named_parameters():
        factor = 1 - 0.5 * 0.4 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, before.get_parameter(name) * factor)


def test_decay_of_sgd_does_not_enter_its_momentum() -> None:
    config = Optimizer.model_validate({"kind": "sgd", "learningRate": 0.1, "weightDecay": 0.4, "betas": [0.9, 0.9]})
    before, after = updated(config, gradient=0.0, steps=3)

    torch.testing.assert_close(after.linear.weight, before.linear.weight * 0.8**3)


def test_adamw_moves_by_the_learning_rate_at_first() -> None:
    config = Optimizer.model_validate({"learningRate": 0.1, "weightDecay": 0.0})
    before, after = updated(config, gradient=2.0)

    torch.testing.assert_close(after.norm.bias, before.norm.bias - 0.5)
