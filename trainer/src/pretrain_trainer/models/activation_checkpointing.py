"""Activation checkpointing: backward recomputes a block's activations instead of keeping them (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain_trainer.models.decoder import Block, Decoder

_ATEN = torch.ops.aten
_KEPT: tuple[Any, ...] = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
)
"""Operations whose results `selective` keeps, since they are expensive: matrix products and attention."""


def recompute_activations(model: Decoder, how: Literal["none", "selective", "full"]) -> None:
    """Keep the input of each block only (full), or also expensive results (selective). Results have the same bits.

    Blocks are not wrapped, so names of parameters stay.
    """
    for block in model.blocks:
        if isinstance(block, Block):
            block.recompute = _recompute(how)


def _recompute(how: Literal["none", "selective", "full"]) -> Callable[..., Tensor] | None:
    match how:
        case "none":
            return None
        case "full":
            return partial(checkpoint, use_reentrant=False)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, list(_KEPT))
            return partial(checkpoint, use_reentrant=False, context_fn=contexts)
