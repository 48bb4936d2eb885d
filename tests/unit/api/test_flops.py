"""FLOPs of a token: the formula, against numbers worked out by hand and published ones."""

from __future__ import annotations

import pytest

from pretrain_api.estimate.flops import flops_per_token, matrix_parameters
from pretrain_api.spec.model import Model, resolve

GPT2_ROWS, LLAMA_ROWS = 50_304, 128_256


def test_gpt2_counts_its_tied_head_once_and_no_positions() -> None:
    """nanoGPT: 124M has 12 x 7,087,872 in its blocks, 1,536 in the last norm, 38,633,472 in the head."""
    model = resolve(Model(preset="gpt2-124m"))

    assert matrix_parameters(model, GPT2_ROWS) == 12 * 7_087_872 + 1_536 + GPT2_ROWS * 768
    assert flops_per_token(model, GPT2_ROWS) == 6 * 123_689_472 + 12 * 12 * 12 * 64 * 1024


def test_an_untied_llama_counts_its_head_and_not_its_embedding() -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters, of which the embedding has 525,336,576."""
    model = resolve(Model(preset="llama-8b"))

    assert matrix_parameters(model, LLAMA_ROWS) == 8_030_261_248 - LLAMA_ROWS * 4096
    assert flops_per_token(model, LLAMA_ROWS) == 6 * 7_504_924_672 + 12 * 32 * 32 * 128 * 8192


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
def test_attention_grows_with_the_context_and_the_rest_does_not(preset: str) -> None:
    short, long = (resolve(Model(preset=preset, context=context)) for context in (64, 128))

    difference = flops_per_token(long, 64) - flops_per_token(short, 64)
    assert difference == 12 * short.layers * short.width * 64


def test_fewer_key_and_value_heads_save_projections_but_no_attention() -> None:
    """12 L H Q T has the heads of queries."""
    grouped, full = (resolve(Model(preset="llama-tiny", kv_heads=heads)) for heads in (2, 4))

    saved = matrix_parameters(full, 64) - matrix_parameters(grouped, 64)
    assert saved == 2 * full.width * full.width
    assert flops_per_token(full, 64) - flops_per_token(grouped, 64) == 6 * saved
