"""Mapping to Hugging Face's `GPT2LMHeadModel` and `LlamaForCausalLM`: names, transposes, config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain_api.spec.model import ResolvedModel, RopeScaling
from pretrain_trainer.models.decoder import NORM_EPSILON

Tensors = dict[str, Tensor]


def config(shape: ResolvedModel, rows: int) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return _gpt2_config(shape, rows) if shape.family == "gpt2" else _llama_config(shape, rows)


def export_state(state: Mapping[str, Tensor], shape: ResolvedModel) -> Tensors:
    """Map our state dict to their names, each tensor contiguous; a tied head is left out, as in theirs."""
    tensors: Tensors = {}
    state = {name: _ungrouped(tensor, shape) if _is_grouped(name) else tensor for name, tensor in state.items()}
    for ours, theirs, transposed in _names(shape):
        if ours in state:
            tensors[theirs] = state[ours].T.contiguous() if transposed else state[ours].contiguous()
        else:  # a bias that theirs always has and this model lacks
            weight = state[ours.removesuffix("bias") + "weight"]
            tensors[theirs] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    if shape.family == "llama":
        for layer in range(shape.layers):
            size = shape.width // shape.heads
            parts = [shape.heads * size, shape.kv_heads * size, shape.kv_heads * size]
            for letter, part in zip("qkv", state[f"blocks.{layer}.attention.qkv.weight"].split(parts), strict=True):
                tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = part.contiguous()
    return tensors


def import_state(tensors: Mapping[str, Tensor], shape: ResolvedModel) -> Tensors:
    """Map their state dict to our names. Raises KeyError with the name of a missing tensor."""
    state = {
        ours: tensors[theirs].T.contiguous() if transposed else tensors[theirs].contiguous()
        for ours, theirs, transposed in _names(shape)
        if shape.bias or not ours.endswith("bias")
    }
    if shape.family == "llama":
        for layer in range(shape.layers):
            parts = [tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
            state[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(parts)
    return {name: _grouped(tensor, shape) if _is_grouped(name) else tensor for name, tensor in state.items()}


def _is_grouped(name: str) -> bool:
    return ".attention.qkv." in name


def _ungrouped(fused: Tensor, shape: ResolvedModel) -> Tensor:
    """Reorder rows of `qkv` from ours, grouped by heads of keys, to theirs: all queries, all keys, all values."""
    groups = fused.unflatten(0, (shape.kv_heads, -1, shape.width // shape.heads))
    parts = groups.split([shape.heads // shape.kv_heads, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])


def _grouped(ungrouped: Tensor, shape: ResolvedModel) -> Tensor:
    """Reorder rows of `qkv` from theirs to ours: the inverse of `_ungrouped`."""
    size = shape.width // shape.heads
    parts = ungrouped.split([shape.heads * size, shape.kv_heads * size, shape.kv_heads * size])
    return torch.cat([part.unflatten(0, (shape.kv_heads, -1, size)) for part in parts], dim=1).flatten(0, 2)


def _names(shape: ResolvedModel) -> Iterator[tuple[str, str, bool]]:
    """Yield (our name, their name, transposed), except a llama's `qkv`: one matrix here and three there."""
    yield from _gpt2_names(shape) if shape.family == "gpt2" else _llama_names(shape)
    if not shape.tied_head:
        yield "head.weight", "lm_head.weight", False


def _gpt2_names(shape: ResolvedModel) -> Iterator[tuple[str, str, bool]]:
    yield "token_embedding.weight", "transformer.wte.weight", False
    yield "position_embedding.weight", "transformer.wpe.weight", False
    layers = {
        "norm_1": "ln_1", "norm_2": "ln_2", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj",
        "up": "mlp.c_fc", "down": "mlp.c_proj",
    }  # fmt: skip
    for layer in range(shape.layers):
        for ours, theirs in layers.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and not ours.startswith("norm")  # their Conv1D is (in, out)
                yield f"blocks.{layer}.{ours}.{kind}", f"transformer.h.{layer}.{theirs}.{kind}", transposed
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", f"transformer.ln_f.{kind}", False


def _llama_names(shape: ResolvedModel) -> Iterator[tuple[str, str, bool]]:
    yield "token_embedding.weight", "model.embed_tokens.weight", False
    layers = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attention.proj": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(shape.layers):
        for ours, theirs in layers.items():
            yield f"blocks.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight", False
    yield "norm.weight", "model.norm.weight", False


def _gpt2_config(shape: ResolvedModel, rows: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": rows,
        "n_positions": shape.context,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.hidden,
        "layer_norm_epsilon": NORM_EPSILON,
        "tie_word_embeddings": shape.tied_head,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
    }


def _llama_config(shape: ResolvedModel, rows: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        rope |= _llama_scaling(shape.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": rows,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": rope,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _llama_scaling(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
