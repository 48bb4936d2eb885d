"""The work that training on a token takes, by the formula that the field reports MFU with."""

from __future__ import annotations

from pretrain_api.spec.model import ResolvedModel, parameters


def matrix_parameters(model: ResolvedModel, rows: int) -> int:
    """Parameters that a token is multiplied with: all but embeddings that are only looked up.

    A tied head is the token embedding used as a matrix, so it counts once (as in nanoGPT); an untied one counts and the
    embedding does not (as in torchtitan). Learned positions never do.
    """
    looked_up = 0 if model.tied_head else rows * model.width
    positions = model.context * model.width if model.family == "gpt2" else 0
    return parameters(model, rows) - looked_up - positions


def flops_per_token(model: ResolvedModel, rows: int) -> int:
    """Floating-point operations of forward and backward for one token: 6 N + 12 L H Q T.

    N: matrix parameters, L: layers, H: query heads, Q: their size, T: context; `rows`: of the token embedding. Source:
    Chowdhery et al. 2022 (PaLM), appendix B. Attention is counted as if it were not causal, and nothing for what
    activation checkpointing computes twice: so the figures can be compared with those of others.
    """
    attention = 12 * model.layers * model.heads * (model.width // model.heads) * model.context
    return 6 * matrix_parameters(model, rows) + attention
