"""Dropout with masks that depend on a seed and a place in the model only, not on a rank's part of it.

The random state of each block is set from the micro-batch's seed and the block's number, so that a pipeline stage draws
the same numbers as a single process. A tensor rank draws the mask of all ranks and takes its part of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_WORD = 1 << 64


class Portion(NamedTuple):
    """Part `number` of `of` equal parts along a dimension."""

    number: int = 0
    of: int = 1


def sow(seed: int | None, place: int) -> None:
    """Seed the random numbers of a place in the model: 0 the embedding, then the blocks. None: leave them alone."""
    if seed is not None:
        torch.manual_seed(mixed(seed, place))


def mixed(seed: int, place: int) -> int:
    """Mix both to 64 bits that depend on all bits (SplitMix64, Steele et al. 2014); the CPU uses a seed's last 32."""
    word = (seed + place * 0x9E3779B97F4A7C15) % _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % _WORD
    return word ^ word >> 31


class Dropout(nn.Module):
    """Dropout of (batch, time, width), of which this rank may have a part along time."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.portion = Portion()

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout in training."""
        return dropped(x, self.probability, self.portion) if self.training else x


def dropped(x: Tensor, probability: float, portion: Portion) -> Tensor:
    """Apply dropout to `x` (batch, parts, …); the mask of the whole is drawn as torch's dropout draws it on the CPU."""
    if portion.of == 1:
        return functional.dropout(x, probability)
    whole = (x.shape[0], x.shape[1] * portion.of, *x.shape[2:])
    kept = torch.empty(whole, dtype=x.dtype, device=x.device).bernoulli_(1 - probability)
    return x * kept.chunk(portion.of, dim=1)[portion.number].div(1 - probability)


def attention_of_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float, portion: Portion
) -> Tensor:
    """Compute causal attention of a part of the heads with dropout of the whole; torch's own draws these heads alone.

    Queries (batch, heads, time, size), keys and values of as many heads or fewer; `mask` as in torch. Memory holds the
    weights (batch, heads, time, time), and briefly the mask of all ranks' heads.
    """
    served = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(served, dim=1) for part in (key, value))
    if mask is None:
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=3)
    return dropped(weights, probability, portion) @ value
