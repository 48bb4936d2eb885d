"""A decoder-only transformer, in the shapes of two families: blocks of causal attention and a perceptron.

gpt2 is Radford et al. 2019 as released: learned positions, LayerNorm with gain and bias, GELU in its tanh form; with
post-norm it is its predecessor (Radford et al. 2018), which normalises after adding, and not at the end.
llama is Dubey et al. 2024: rotary positions, RMSNorm, grouped-query attention, SwiGLU, no biases. Weights are drawn
with standard deviation 0.02, those of the projections into the residual stream divided by sqrt(2 * layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain_api.model import ResolvedModel
from pretrain_trainer.documents import same_document
from pretrain_trainer.rotary import Rotation, rotate, rotation

INITIAL_DEVIATION = 0.02
NORM_EPSILON = 1e-5

Head = Callable[[Tensor, Tensor], Tensor]
"""What is made of the last hidden state (batch, time, width) and the head's weights (rows, width)."""


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width); `kv_heads` heads of keys and values serve `heads` of queries."""

    def __init__(self, shape: ResolvedModel) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.size = shape.width // shape.heads
        self.dropout = shape.dropout
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * self.size, bias=shape.bias)
        self.proj = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor, rotary: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """(batch, time, width) to the same; a position sees itself and earlier ones, or what `mask` says."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.size).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mixed = functional.scaled_dot_product_attention(
            query, key, value,
            dropout_p=self.dropout if self.training else 0.0,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != self.heads,
        )  # fmt: skip
        return self.proj(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to the residual stream; post-norm: added first."""

    def __init__(self, shape: ResolvedModel) -> None:
        super().__init__()
        self.post_norm = shape.norm == "post"
        self.norm_1 = _norm(shape)
        self.attention = Attention(shape)
        self.norm_2 = _norm(shape)
        self.up = nn.Linear(shape.width, shape.hidden, bias=shape.bias)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.family == "llama" else None
        self.down = nn.Linear(shape.hidden, shape.width, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()
        self.recompute: Callable[..., Tensor] | None = None
        """Calls what it is given so that backward computes it again, instead of keeping all of it."""

    def forward(self, x: Tensor, rotary: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """(batch, time, width) to the same."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self._compute(x, rotary, mask)
        return self.recompute(self._compute, x, rotary, mask)

    def _compute(self, x: Tensor, rotary: Rotation | None, mask: Tensor | None) -> Tensor:
        if self.post_norm:
            x = self.norm_1(x + self.dropout(self.attention(x, rotary, mask)))
            return self.norm_2(x + self.dropout(self._perceptron(x)))
        x = x + self.dropout(self.attention(self.norm_1(x), rotary, mask))
        return x + self.dropout(self._perceptron(self.norm_2(x)))

    def _perceptron(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(functional.gelu(self.up(x), approximate="tanh"))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """The model. Built on the meta device by `build`; its values come from `initialise` or a checkpoint."""

    def __init__(self, shape: ResolvedModel, rows: int) -> None:
        super().__init__()
        self.shape = shape
        self.context = shape.context
        self.token_embedding = nn.Embedding(rows, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width) if shape.family == "gpt2" else None
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = _norm(shape) if shape.norm == "pre" else nn.Identity()
        self.head = None if shape.tied_head else nn.Linear(shape.width, rows, bias=False)
        self.document_end: int | None = None
        """The token that attention does not look back over; None: it sees all before."""

    def forward(self, tokens: Tensor, head: Head = functional.linear) -> Tensor:
        """Logits (batch, time, rows) of the next token, from tokens (batch, time) with time <= context; or what
        `head` makes in their place.
        """
        time = tokens.shape[1]
        x = self.token_embedding(tokens)
        rotary = None
        if self.position_embedding is None:
            rotary = rotation(self.shape, time, tokens.device, x.dtype)
        else:
            x = x + self.position_embedding.weight[:time]
        x = self.dropout(x)
        mask = None if self.document_end is None else same_document(tokens, self.document_end)
        for block in self.blocks:
            x = block(x, rotary, mask)
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return head(self.norm(x), weight)


def _norm(shape: ResolvedModel) -> nn.Module:
    if shape.family == "llama":
        return nn.RMSNorm(shape.width, eps=NORM_EPSILON)
    return nn.LayerNorm(shape.width, eps=NORM_EPSILON, bias=shape.bias)


def build(shape: ResolvedModel, rows: int, device: torch.device) -> Decoder:
    """A model on `device` whose values are not set: memory only, no time spent on values that a restore replaces."""
    with torch.device("meta"):
        model = Decoder(shape, rows)
    return model.to_empty(device=device)


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
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
