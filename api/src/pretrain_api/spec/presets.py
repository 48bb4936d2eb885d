"""Model presets: shapes by name."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class Shape:
    """Fields of a model that a preset sets. The vocabulary is the tokeniser's."""

    family: Family
    layers: int
    heads: int
    width: int
    context: int
    kv_heads: int | None = None
    """None: same as `heads`."""
    hidden: int | None = None
    """Width of the perceptron; None: the family's default."""
    rope_theta: float | None = None
    tied_head: bool | None = None
    """None: the family's default."""


PRESETS = MappingProxyType(
    {
        # Radford et al. 2019, table 2, with the head counts of the released checkpoints.
        "gpt2-124m": Shape("gpt2", layers=12, heads=12, width=768, context=1024),
        "gpt2-355m": Shape("gpt2", layers=24, heads=16, width=1024, context=1024),
        "gpt2-774m": Shape("gpt2", layers=36, heads=20, width=1280, context=1024),
        "gpt2-1.5b": Shape("gpt2", layers=48, heads=25, width=1600, context=1024),
        # Dubey et al. 2024, table 3, and the configurations released with Llama 3.1 and 3.2; the context is that of the
        # pre-training before the extension to long contexts.
        "llama-1b": Shape("llama", 16, 32, 2048, 8192, kv_heads=8, hidden=8192, rope_theta=500_000.0, tied_head=True),
        "llama-3b": Shape("llama", 28, 24, 3072, 8192, kv_heads=8, hidden=8192, rope_theta=500_000.0, tied_head=True),
        "llama-8b": Shape("llama", 32, 32, 4096, 8192, kv_heads=8, hidden=14_336, rope_theta=500_000.0),
        "llama-70b": Shape("llama", 80, 64, 8192, 8192, kv_heads=8, hidden=28_672, rope_theta=500_000.0),
        # For tests and first runs: a step takes milliseconds on a CPU.
        "gpt2-tiny": Shape("gpt2", layers=2, heads=2, width=32, context=32),
        "llama-tiny": Shape("llama", layers=2, heads=4, width=32, context=32, kv_heads=2),
    }
)
