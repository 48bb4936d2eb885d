"""Training loss: cross-entropy in nats summed over targets, whole or by chunks, with an optional z-loss."""

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
    """Cross-entropy, with the gradient of a z-loss added.

    The z-loss is `z` times the squared logarithm of the softmax's denominator (PaLM, Chowdhery et al. 2022, section 5).
    The value stays the cross-entropy, so that losses of runs with and without it can be compared.
    """

    z: float = 0.0
    chunk: int | None = None
    """Number of targets whose logits are in memory at once; None: all of a micro-batch."""

    @classmethod
    def of(cls, loss: Loss) -> Objective:
        """Return the configured objective."""
        return cls(loss.z_loss, loss.chunk)

    def __call__(
        self, model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Return the loss summed over all targets of windows (batch, context + 1); see Decoder for the rest."""
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
        """Compute the loss by chunks, whose logits are freed after forward and recomputed in backward."""
        assert self.chunk is not None
        loss = torch.zeros((), device=hidden.device)
        for part, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            loss = loss + checkpoint(
                self._of_hidden, part, weight, wanted, use_reentrant=False, preserve_rng_state=False
            )
        return loss

    def _of_hidden(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return self._of_logits(logits_of(hidden, weight), targets)
