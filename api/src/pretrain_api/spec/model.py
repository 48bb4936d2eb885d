"""`spec.training.model`, and `resolve`, which completes it to the full shape of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from pretrain_api.base import Frozen, Spec
from pretrain_api.spec.presets import PRESETS, Family, Shape

HIDDEN_MULTIPLE = 256
EMBEDDING_MULTIPLE = 64
"""Multiple that embedding rows are rounded up to: matrix sizes that run fast on hardware."""


class RopeScaling(Spec):
    """Rotary scaling of Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""

    factor: float = Field(ge=1, le=1000, description="Factor by which long wavelengths are stretched")
    low_frequency_factor: float = Field(
        default=1.0, gt=0, le=1000, description="Wavelengths above the original context over this factor are stretched"
    )
    high_frequency_factor: float = Field(
        default=4.0, gt=0, le=1000, description="Wavelengths below the original context over this factor are kept"
    )
    original_context: int = Field(default=8192, ge=1, le=2**24, description="Context of the original model")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"lowFrequencyFactor ({self.low_frequency_factor}) is not less than highFrequencyFactor "
                f"({self.high_frequency_factor}): lower the first"
            )
        return self


class Model(Spec):
    """Decoder-only transformer: a preset, explicit fields, or a preset with some fields overridden."""

    preset: str | None = Field(
        default=None, description="Name of a preset shape", json_schema_extra={"enum": list(PRESETS)}
    )
    family: Family | None = Field(default=None, description="Architecture; absent: the preset's, or gpt2")
    layers: int | None = Field(default=None, ge=1, le=1000, description="Transformer blocks")
    heads: int | None = Field(default=None, ge=1, le=1024, description="Attention heads; divides `width`")
    kv_heads: int | None = Field(
        default=None, ge=1, le=1024, description="Key and value heads (llama); divides `heads`; absent: `heads`"
    )
    width: int | None = Field(default=None, ge=1, le=131_072, description="Size of the residual stream")
    hidden: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Width of the perceptron; absent: 4 widths (gpt2), 8/3 widths rounded up to 256 (llama)",
    )
    rope_theta: float | None = Field(
        default=None, ge=1, le=1e12, description="Base of the rotary frequencies (llama); absent: 10000"
    )
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Scaling of the rotary frequencies to longer contexts (llama); absent: none"
    )
    context: int | None = Field(default=None, ge=1, le=2**24, description="Tokens in a training sequence")
    vocabulary: int | None = Field(
        default=None,
        ge=2,
        le=2**31,
        description="Rows of the embedding; absent: the tokeniser's size, rounded up to 64",
    )
    tied_head: bool | None = Field(
        default=None, description="The output head shares the token embedding's weights; absent: true for gpt2 only"
    )
    bias: bool | None = Field(
        default=None, description="Linear layers and LayerNorms have biases (gpt2); absent: true for gpt2 only"
    )
    norm: Literal["pre", "post"] | None = Field(
        default=None,
        description="pre: normalise before each part of a block and at the end; post: after each (gpt2); absent: pre",
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="Probability; absent: 0")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        resolve(self)
        return self


class ResolvedModel(Frozen):
    """Complete model; only the vocabulary may be left to the tokeniser."""

    family: Family
    layers: int
    heads: int
    kv_heads: int
    width: int
    hidden: int
    context: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    vocabulary: int | None
    tied_head: bool
    bias: bool
    dropout: float
    norm: Literal["pre", "post"] = "pre"

    def embedding_rows(self, tokenizer_vocabulary: int) -> int:
        """Return the rows of the token embedding: the given ones, or the tokeniser's vocabulary rounded up to 64."""
        if self.vocabulary is not None:
            return self.vocabulary
        return -(-tokenizer_vocabulary // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE


def resolve(model: Model) -> ResolvedModel:
    """Fill in the defaults of preset and family. Raises ValueError with the field and the fix."""
    shape = _shape(model)
    kv_heads = model.kv_heads or shape.kv_heads or shape.heads
    gpt2 = shape.family == "gpt2"
    if shape.width % shape.heads:
        raise ValueError(f"heads ({shape.heads}) does not divide width ({shape.width}): choose a divisor")
    if shape.heads % kv_heads:
        raise ValueError(f"kvHeads ({kv_heads}) does not divide heads ({shape.heads}): choose a divisor")
    if gpt2 and kv_heads != shape.heads:
        raise ValueError("kvHeads is for family llama: leave it out, or set family to llama")
    if gpt2 and (model.rope_theta is not None or model.rope_scaling is not None):
        raise ValueError("ropeTheta and ropeScaling are for family llama: leave them out, or set family to llama")
    if not gpt2 and model.bias:
        raise ValueError("bias is for family gpt2: leave it out, or set family to gpt2")
    if not gpt2 and model.norm == "post":
        raise ValueError("norm post is for family gpt2: leave it out, or set family to gpt2")
    if not gpt2 and (shape.width // shape.heads) % 2:
        raise ValueError(
            f"width / heads ({shape.width // shape.heads}) is odd, which rotary positions of family llama cannot use: "
            "change width or heads"
        )
    return ResolvedModel(
        family=shape.family,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=kv_heads,
        width=shape.width,
        hidden=model.hidden or shape.hidden or _hidden(shape),
        context=shape.context,
        rope_theta=model.rope_theta or shape.rope_theta or 10_000.0,
        rope_scaling=model.rope_scaling,
        vocabulary=model.vocabulary,
        tied_head=next(tied for tied in (model.tied_head, shape.tied_head, gpt2) if tied is not None),
        bias=model.bias if model.bias is not None else gpt2,
        dropout=model.dropout if model.dropout is not None else 0.0,
        norm=model.norm or "pre",
    )


def parameters(model: ResolvedModel, rows: int) -> int:
    """Count the parameters of a model whose token embedding has `rows` rows."""
    width, hidden, bias, llama = model.width, model.hidden, int(model.bias), model.family == "llama"
    norm = width + bias * width
    inputs = width + 2 * model.kv_heads * (width // model.heads)
    attention = width * inputs + width * width + bias * (inputs + width)
    feed_forward = (3 if llama else 2) * width * hidden + bias * (hidden + width)
    positions = 0 if llama else model.context * width
    embeddings = rows * width + positions + (0 if model.tied_head else rows * width)
    return embeddings + model.layers * (2 * norm + attention + feed_forward) + (norm if model.norm == "pre" else 0)


def _hidden(shape: Shape) -> int:
    """Return the family's default width of the perceptron: Radford et al. 2019; Touvron et al. 2023, section 2.2."""
    if shape.family == "gpt2":
        return 4 * shape.width
    return -(-8 * shape.width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


def _shape(model: Model) -> Shape:
    """Return the preset with the user's overrides, or the user's own fields."""
    if model.preset is not None and model.preset not in PRESETS:
        raise ValueError(f"unknown preset {model.preset!r}: use one of {', '.join(PRESETS)}, or fields of your own")
    base = PRESETS[model.preset] if model.preset is not None else None
    layers = model.layers or (base.layers if base else None)
    heads = model.heads or (base.heads if base else None)
    width = model.width or (base.width if base else None)
    context = model.context or (base.context if base else None)
    if layers is None or heads is None or width is None or context is None:
        found = {"layers": layers, "heads": heads, "width": width, "context": context}
        missing = ", ".join(name for name, value in found.items() if value is None)
        raise ValueError(f"give a preset ({', '.join(PRESETS)}), or the missing fields: {missing}")
    family = model.family or (base.family if base else "gpt2")
    if base is None or family != base.family:
        return Shape(family, layers, heads, width, context)
    same = width == base.width and heads == base.heads
    return replace(
        base, layers=layers, heads=heads, width=width, context=context,
        kv_heads=base.kv_heads if same else None, hidden=base.hidden if same else None,
    )  # fmt: skip
