"""FLOPs of training on a token, by the formula commonly used for MFU."""

from __future__ import annotations

from pretrain_api.spec.model import ResolvedModel, parameters


def matrix_parameters(model: ResolvedModel, rows: int) -> int:
    """Count the parameters that a token is multiplied with: all but embedding look-ups.

    A tied head uses the token embedding as a matrix and counts once (as in nanoGPT); an untied head counts and the
    embedding does not (as in torchtitan). Learned positions do not count.
    """
    looked_up = 0 if model.tied_head else rows * model.width
    positions = model.context * model.width if model.family == "gpt2" else 0
    return parameters(model, rows) - looked_up - positions


def flops_per_token(model: ResolvedModel, rows: int) -> int:
    """Compute the floating-point operations of forward and backward for one token: 6 N + 12 L H Q T.

    N: matrix parameters, L: layers, H: query heads, Q: head size, T: context; `rows`: rows of the token embedding.
    Source: Chowdhery et al. 2022 (PaLM), appendix B. To be comparable with published figures, attention counts as if it
    were not causal and recomputation by activation checkpointing does not count.
    """
    attention = 12 * model.layers * model.heads * (model.width // model.heads) * model.context
    return 6 * matrix_parameters(model, rows) + attention
