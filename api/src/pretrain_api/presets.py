"""Model presets: shapes by name."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class Shape:
    """The part of a model that a preset fixes. The vocabulary is never part of it: it is the tokeniser's."""

    family: Family
    layers: int
    heads: int
    width: int
    context: int


PRESETS = MappingProxyType(
    {
        # Radford et al. 2019, table 2, with the head counts of the released checkpoints.
        "gpt2-124m": Shape("gpt2", layers=12, heads=12, width=768, context=1024),
        "gpt2-355m": Shape("gpt2", layers=24, heads=16, width=1024, context=1024),
        "gpt2-774m": Shape("gpt2", layers=36, heads=20, width=1280, context=1024),
        "gpt2-1.5b": Shape("gpt2", layers=48, heads=25, width=1600, context=1024),
        # For tests and first tries: a step takes milliseconds on a CPU.
        "gpt2-tiny": Shape("gpt2", layers=2, heads=2, width=32, context=32),
    }
)
