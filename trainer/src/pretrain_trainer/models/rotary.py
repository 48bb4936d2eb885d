"""Rotary positions (Su et al. 2021), in the layout of Llama: the first half of a head is rotated with the second."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain_api.spec.model import ResolvedModel, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each (time, head size)."""


def rotation(shape: ResolvedModel, time: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Return the rotations of positions 0..time-1 in `dtype`, computed in fp32."""
    size = shape.width // shape.heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    frequencies = 1.0 / shape.rope_theta**exponents
    if shape.rope_scaling is not None:
        frequencies = _stretched(frequencies, shape.rope_scaling)
    angles = torch.outer(torch.arange(time, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotation) -> Tensor:
    """Rotate heads (batch, heads, time, head size) by their positions."""
    cosine, sine = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, blend those between (Llama 3.1)."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)
