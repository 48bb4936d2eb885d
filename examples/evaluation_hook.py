"""Custom evaluation: how often the model prefers the right one of two endings, and by which margin.

    training:
      evaluation: {every: 500, sources: […], hook: evaluation_hook.py:endings}

All ranks call it between two steps, and it calls the same methods on every rank (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_trainer.eval_api import Trained

PAIRS = (
    ("import ", "os", "xq"),
    ("def __init__(self", "):", "zz"),
    ("return ", "None", "Nnoe"),
    ("for i in ", "range", "ranges of"),
)
"""A beginning, the right ending, and a wrong one."""


def endings(trained: Trained) -> Mapping[str, float]:
    """Return the share of pairs whose right ending has the lower loss, and the mean margin in nats per token."""
    sequences, lengths = [], []
    for beginning, right, wrong in PAIRS:
        for ending in (right, wrong):
            # Encode them separately, so that both endings follow the same tokens.
            start, end = (trained.tokenizer.encode(text, add_special_tokens=False).ids for text in (beginning, ending))
            sequences += [start, start + end]
            lengths.append(len(end))
    losses = trained.losses(sequences)
    costs = [(whole - start) / length for start, whole, length in zip(losses[::2], losses[1::2], lengths, strict=True)]
    margins = [wrong - right for right, wrong in zip(costs[::2], costs[1::2], strict=True)]
    return {
        "endings/right": sum(margin > 0 for margin in margins) / len(margins),
        "endings/margin": sum(margins) / len(margins),
    }
