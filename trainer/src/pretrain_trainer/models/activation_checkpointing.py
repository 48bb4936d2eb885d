"""Activation checkpointing: what backward needs of a block is computed again instead of kept (Chen et al. 2016)."""

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
"""The expensive ones: results of matrix products and attention."""


def recompute_activations(model: Decoder, how: Literal["none", "selective", "full"]) -> None:
    """Keep of each block its input only (full), or also what was expensive (selective). The results have the same bits.

    Names of parameters stay: blocks are not wrapped.
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
