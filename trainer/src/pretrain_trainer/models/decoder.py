"""A decoder-only transformer, in the shapes of two families: blocks of causal attention and a perceptron.

gpt2 is Radford et al. 2019 as released: learned positions, LayerNorm with gain and bias, GELU in its tanh form; with
post-norm it is its predecessor (Radford et al. 2018), which normalises after adding, and not at the end.
llama is Dubey et al. 2024: rotary positions, RMSNorm, grouped-query attention, SwiGLU, no biases. Weights are drawn
with standard deviation 0.02, those of the projections into the residual stream divided by sqrt(2 * layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from pretrain_api.spec.model import ResolvedModel
from pretrain_trainer.models.document_mask import same_document
from pretrain_trainer.models.dropout import Dropout, Portion, attention_of_part, sow
from pretrain_trainer.models.rotary import Rotation, rotate, rotation

INITIAL_DEVIATION = 0.02
NORM_EPSILON = 1e-5

Head = Callable[[Tensor, Tensor], Tensor]
"""Function of the last hidden state (batch, time, width) and the head's weights (rows, width)."""


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width); `kv_heads` heads of keys and values serve `heads` of queries.

    The rows of `qkv` are grouped by the heads of keys: the queries that one serves, then its key, then its value. So
    any whole groups of rows are an attention of fewer heads, which tensor parallelism cuts out.
    """

    def __init__(self, shape: ResolvedModel) -> None:
        super().__init__()
        self.served = shape.heads // shape.kv_heads
        """Heads of queries per head of keys."""
        self.size = shape.width // shape.heads
        self.dropout = shape.dropout
        self.portion = Portion()
        """Part of the heads on this rank."""
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * self.size, bias=shape.bias)
        self.proj = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor, rotary: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """Map (batch, time, width) to the same shape; a position sees itself and earlier ones, or those of `mask`."""
        groups = self.qkv(x)  # of the whole sequence, even if `x` is a part of it
        groups = groups.unflatten(2, (-1, self.served + 2, self.size))
        query, key, value = groups.split([self.served, 1, 1], dim=3)
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in (query, key, value))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        dropout = self.dropout if self.training else 0.0
        if dropout and self.portion.of > 1:
            mixed = attention_of_part(query, key, value, mask, dropout, self.portion)
        else:
            mixed = functional.scaled_dot_product_attention(
                query, key, value,
                dropout_p=dropout,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.served > 1,
            )  # fmt: skip
        return self.proj(mixed.transpose(1, 2).flatten(2))


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
        self.dropout = Dropout(shape.dropout) if shape.dropout else nn.Identity()
        self.recompute: Callable[..., Tensor] | None = None
        """Calls a function so that backward recomputes its activations."""

    def forward(self, x: Tensor, rotary: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """Map (batch, time, width) to the same shape."""
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
        self.rows = rows
        self.context = shape.context
        self.token_embedding: nn.Embedding | None = nn.Embedding(rows, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width) if shape.family == "gpt2" else None
        self.dropout = Dropout(shape.dropout) if shape.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm: nn.Module | None = _norm(shape) if shape.norm == "pre" else nn.Identity()
        self.head = None if shape.tied_head else nn.Linear(shape.width, rows, bias=False)
        self.document_end: int | None = None
        """The token that attention does not look back over; None: no document mask."""

    def forward(
        self, tokens: Tensor, head: Head | None = None, hidden: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Return the logits (batch, time, rows) of the next token for tokens (batch, time), or the result of `head`.

        time <= context. A pipeline stage starts from `hidden`, the output of the stage before; the last stage has the
        head. Dropout depends on the seed alone, or without one on torch's random state.
        """
        sow(seed, 0)
        x = self._embed(tokens) if hidden is None else hidden
        rotary = None
        if self.shape.family == "llama":
            rotary = rotation(self.shape, tokens.shape[1], tokens.device, x.dtype)
        mask = None if self.document_end is None else same_document(tokens, self.document_end)
        for number, block in enumerate(self.blocks, 1):
            sow(seed, number)
            x = block(x, rotary, mask)
        if self.norm is None:
            return x
        table = self.token_embedding if self.head is None else self.head
        assert table is not None  # the stage with the norm has the table
        return (head or logits_of)(self.norm(x), table.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.token_embedding is not None  # the first stage has it
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        return self.dropout(x)


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the logits (…, rows) of a hidden state (…, width), gathered if tensor ranks have parts of the rows."""
    logits = functional.linear(hidden, weight)
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _norm(shape: ResolvedModel) -> nn.Module:
    if shape.family == "llama":
        return nn.RMSNorm(shape.width, eps=NORM_EPSILON)
    return nn.LayerNorm(shape.width, eps=NORM_EPSILON, bias=shape.bias)


def build(shape: ResolvedModel, rows: int, device: torch.device) -> Decoder:
    """Build a model on `device` with uninitialised values, which a restore replaces."""
    return skeleton(shape, rows).to_empty(device=device)


def skeleton(shape: ResolvedModel, rows: int) -> Decoder:
    """Build a model without memory, on the meta device, to be partitioned before it gets any."""
    with torch.device("meta"):
        return Decoder(shape, rows)


def initial_values(model: Decoder, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole value) of every parameter of the whole model, on the CPU, one by one.

    The values are the same on every rank and machine type: all ranks draw all of them, whatever part they have.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = INITIAL_DEVIATION / math.sqrt(2 * model.shape.layers)
    for name, parameter in skeleton(model.shape, model.rows).named_parameters():
        value = torch.empty(parameter.shape)
        if name.endswith("bias"):
            value.zero_()
        elif parameter.dim() == 1:
            value.fill_(1.0)
        else:
            deviation = residual if name.endswith(("proj.weight", "down.weight")) else INITIAL_DEVIATION
            value.normal_(0.0, deviation, generator=generator)
        yield name, value


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Set all parameters of a whole model from the seed; `parallelize.initialise_part` sets a part of one."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)
