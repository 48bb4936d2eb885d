"""Compatibility of one model's weights with another model, by users' field names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NORM_EPSILON = 1e-5
_SHAPE = ("family", "layers", "heads", "kvHeads", "width", "hidden", "tiedHead", "bias", "vocabulary")


def incompatibility(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Explain why weights of `found` cannot initialise `wanted`, by the first differing field; None: they can.

    Both are in the form of `identity.model_fields`. Dropout may change, and so may settings of computed positions: a
    llama's context, a higher rotary base, and scaling where there was none.
    """
    fields = (*_SHAPE, *(() if wanted["family"] == "llama" else ("context",)))
    for name in fields:
        if name in found and found[name] != wanted[name]:
            return f"training.model.{name} is {_text(wanted[name])} here and {_text(found[name])} there"
    if found.get("ropeTheta", 0) > wanted["ropeTheta"]:
        return f"training.model.ropeTheta is {wanted['ropeTheta']:g} here and {found['ropeTheta']:g} there"
    scaling = found.get("ropeScaling")
    if scaling is not None and scaling != wanted["ropeScaling"]:
        return f"training.model.ropeScaling is {_text(wanted['ropeScaling'])} here and {_text(scaling)} there"
    return None


def from_hugging_face(content: bytes) -> dict[str, Any]:
    """Parse a `config.json` into the form of `identity.model_fields`.

    Raises ValueError with the unsupported part.
    """
    try:
        config = json.loads(content)
        kind = config["model_type"]
        if kind == "gpt2":
            return _gpt2(config)
        if kind == "llama":
            return _llama(config)
    except (TypeError, KeyError, ValueError) as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"its config.json cannot be read ({error})") from error
    raise ValueError(f"its config.json describes a {kind}; supported families: gpt2 and llama")


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "activation_function", "gelu_new", "gelu_new")
    _require(config, "layer_norm_epsilon", NORM_EPSILON, NORM_EPSILON)
    _require(config, "scale_attn_weights", True, True)
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    return {
        "family": "gpt2",
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "kvHeads": config["n_head"],
        "width": config["n_embd"],
        "hidden": config.get("n_inner") or 4 * config["n_embd"],
        "context": config["n_positions"],
        "vocabulary": config["vocab_size"],
        "tiedHead": config.get("tie_word_embeddings", True),
    }  # no bias field: theirs always has one, zero in a model without biases


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "hidden_act", "silu", "silu")
    _require(config, "rms_norm_eps", 1e-6, NORM_EPSILON)
    _require(config, "attention_bias", False, False)
    _require(config, "mlp_bias", False, False)
    size = config["hidden_size"] // config["num_attention_heads"]
    _require(config, "head_dim", size, size)
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "family": "llama",
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kvHeads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "width": config["hidden_size"],
        "hidden": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "ropeTheta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "ropeScaling": _scaling(rope),
        "vocabulary": config["vocab_size"],
        "tiedHead": config.get("tie_word_embeddings", False),
        "bias": False,
    }


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"its config.json has rotary positions of type {kind}; supported types: default and llama3")
    return {
        "factor": float(rope["factor"]),
        "lowFrequencyFactor": float(rope["low_freq_factor"]),
        "highFrequencyFactor": float(rope["high_freq_factor"]),
        "originalContext": rope["original_max_position_embeddings"],
    }


def _require(config: Mapping[str, Any], name: str, default: object, wanted: object) -> None:
    found = config.get(name)
    if (default if found is None else found) != wanted:
        raise ValueError(f"its config.json has {name} {found if found is not None else default}; supported: {wanted}")


def _text(value: object) -> str:
    if value is None:
        return "absent"
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)
