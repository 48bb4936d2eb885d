"""A GPT-2 style decoder: learned positions, pre-norm blocks, GELU, one matrix for embedding and head if tied.

The architecture is that of Radford et al. 2019 as released: LayerNorm with gain and bias, GELU in its tanh form,
weights drawn with standard deviation 0.02, those of the projections into the residual stream divided by
sqrt(2 * layers).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain_api.model import ResolvedModel

INITIAL_DEVIATION = 0.02


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width)."""

    def __init__(self, shape: ResolvedModel) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=shape.bias)
        self.proj = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same; a position sees itself and earlier ones."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to the residual stream."""

    def __init__(self, shape: ResolvedModel) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.width, bias=shape.bias)
        self.attention = Attention(shape)
        self.norm_2 = nn.LayerNorm(shape.width, bias=shape.bias)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=shape.bias)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh")))


class Gpt(nn.Module):
    """The decoder. Built on the meta device by `build`; its values come from `initialise` or a checkpoint."""

    def __init__(self, shape: ResolvedModel, rows: int) -> None:
        super().__init__()
        self.context = shape.context
        self.token_embedding = nn.Embedding(rows, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=shape.bias)
        self.head = None if shape.tied_head else nn.Linear(shape.width, rows, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, rows) of the next token, from tokens (batch, time) with time <= context."""
        positions = self.position_embedding.weight[: tokens.shape[1]]
        x = self.dropout(self.token_embedding(tokens) + positions)
        for block in self.blocks:
            x = block(x)
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return functional.linear(self.norm(x), weight)


def build(shape: ResolvedModel, rows: int, device: torch.device) -> Gpt:
    """A model on `device` whose values are not set: memory only, no time spent on values that a restore replaces."""
    with torch.device("meta"):
        model = Gpt(shape, rows)
    return model.to_empty(device=device)


@torch.no_grad()
def initialise(model: Gpt, seed: int) -> None:
    """Set all parameters from the seed: the same on every rank and machine type."""
    generator = torch.Generator().manual_seed(seed)
    residual = INITIAL_DEVIATION / math.sqrt(2 * len(model.blocks))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            deviation = residual if name.endswith(("proj.weight", "down.weight")) else INITIAL_DEVIATION
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))


def summed_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all targets of windows (batch, context + 1)."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")
