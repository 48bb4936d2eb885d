"""What training minimises: cross-entropy in nats summed over targets, whole or by chunks, with a z-loss if wished."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pretrain_api.spec.training import Loss
from pretrain_trainer.models.decoder import logits_of


@dataclass(frozen=True)
class Objective:
    """`z` times the squared logarithm of the softmax's denominator (PaLM, Chowdhery et al. 2022, section 5) is added to
    the gradient. The value stays the cross-entropy, so that losses of runs with and without can be compared.
    """

    z: float = 0.0
    chunk: int | None = None
    """Targets whose logits are there at once; None: all of a micro-batch."""

    @classmethod
    def of(cls, loss: Loss) -> Objective:
        """As configured."""
        return cls(loss.z_loss, loss.chunk)

    def __call__(
        self, model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Summed over all targets of windows (batch, context + 1); `hidden` and `seed` as in the model."""
        targets = windows[:, 1:].flatten()
        if self.chunk is None:
            return self._of_logits(model(windows[:, :-1], None, hidden, seed).flatten(0, 1), targets)

        def head(last: Tensor, weight: Tensor) -> Tensor:
            return self._chunked(last.flatten(0, 1), weight, targets)

        return model(windows[:, :-1], head, hidden, seed)

    def _of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        if self.z:
            penalty = self.z * logits.logsumexp(-1).square().sum()
            loss = loss + (penalty - penalty.detach())
        return loss

    def _chunked(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Each chunk's logits are dropped after forward and computed again in backward."""
        assert self.chunk is not None
        loss = torch.zeros((), device=hidden.device)
        for part, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            loss = loss + checkpoint(
                self._of_hidden, part, weight, wanted, use_reentrant=False, preserve_rng_state=False
            )
        return loss

    def _of_hidden(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return self._of_logits(logits_of(hidden, weight), targets)
