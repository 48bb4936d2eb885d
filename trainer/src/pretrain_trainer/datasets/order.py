"""Data order: the sequences of a step as a pure function of step, seed and mix, equal at any world size.

Sequences are numbered by position 0, 1, 2, …; *data step* d holds the positions (d - 1) * G up to d * G - 1. Step s
trains on the s-th data step outside the skipped ranges, which are ranges of data steps: those are equal to step numbers
until the first skip.

Positions are grouped into mix blocks. In each block every source has a fixed number of places, by its weight, and a
seeded permutation shuffles them: position p is the k-th sequence of some source, where k follows by arithmetic.
Sequence k of a source is in epoch k // windows, and a seeded permutation per epoch maps it to a window.

The permutations are small Feistel networks, computed element by element in O(1) memory. They are implemented here
because the streams of numpy's and torch's generators may change between versions, and with them the order of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain_api.checkpoint.lineage import StepRange, data_step
from pretrain_trainer.core.errors import InvalidInput

MIX_BLOCK = 4096
"""Positions in a mix block: the resolution of weights is 1 / MIX_BLOCK."""
ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class MixSource:
    """Name, weight and number of windows of a source."""

    name: str
    weight: float
    windows: int


@dataclass(frozen=True)
class Sequences:
    """Sequences by number: the i-th one is window `windows[i]` of source `sources[i]`."""

    sources: NDArray[np.intp]
    windows: NDArray[np.int64]


class DataOrder:
    """The data order of a run."""

    def __init__(self, sources: Sequence[MixSource], sequences_per_step: int, seed: int) -> None:
        self._sequences_per_step = sequences_per_step
        self._counts = apportion(sources)
        self._ends = np.cumsum(self._counts)
        self._windows = [source.windows for source in sources]
        self._mix_key = _text_key(f"mix/{seed}")
        self._source_keys = [_text_key(f"source/{seed}/{source.name}") for source in sources]

    def of_step(self, step: int, skipped: Sequence[StepRange], part: range) -> Sequences:
        """Return the sequences `part` (numbers within the step, 0 to G - 1) of this step."""
        first = (data_step(step, skipped) - 1) * self._sequences_per_step
        return self.at(np.arange(first + part.start, first + part.stop, dtype=np.uint64))

    def at(self, positions: Words) -> Sequences:
        """Return the sequences at these positions."""
        blocks, places = np.divmod(positions, np.uint64(MIX_BLOCK))
        shuffled = permute(places, MIX_BLOCK, _keys(self._mix_key, blocks)).astype(np.int64)
        sources = np.searchsorted(self._ends, shuffled, side="right")
        windows = np.empty(len(positions), dtype=np.int64)
        for index, count in enumerate(self._counts):
            mine = sources == index
            if not mine.any():
                continue
            place = shuffled[mine] - (self._ends[index] - count)
            ordinals = blocks[mine] * np.uint64(count) + place.astype(np.uint64)
            epochs, offsets = np.divmod(ordinals, np.uint64(self._windows[index]))
            windows[mine] = permute(offsets, self._windows[index], _keys(self._source_keys[index], epochs))
        return Sequences(sources, windows)


def apportion(sources: Sequence[MixSource]) -> list[int]:
    """Divide the places of a mix block among the sources by weight, with the method of the largest remainder.

    Raises InvalidInput when a source gets no place: it would never be trained on.
    """
    total = sum(source.weight for source in sources)
    shares = [source.weight / total * MIX_BLOCK for source in sources]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(sources)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: MIX_BLOCK - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise InvalidInput(
                f"training.data.sources[{source.name}].weight ({source.weight}) is less than one in {2 * MIX_BLOCK} "
                "of all weights, so the source would never be trained on: raise it or leave the source out"
            )
    return counts


def permute(values: Words, size: int, keys: Words) -> Words:
    """Permute values of 0..size-1, each by the permutation of its key.

    A Feistel network over the smallest power of two that holds the range, applied until the result is in the range.
    """
    bits = (size - 1).bit_length()
    result = np.empty_like(values)
    pending = np.arange(len(values))
    while len(pending):
        values = _feistel(values, bits, keys)
        inside = values < np.uint64(size)
        result[pending[inside]] = values[inside]
        pending, values, keys = pending[~inside], values[~inside], keys[~inside]
    return result


def _feistel(values: Words, bits: int, keys: Words) -> Words:
    """Apply a keyed bijection of 0..2**bits-1. The halves may differ by a bit; each round changes one by the other."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for number in range(ROUNDS):
        round_keys = keys + np.uint64((number + 1) * _GOLDEN & _WORD)
        if number % 2:
            low = low ^ (_mixed(high ^ round_keys) & low_mask)
        else:
            high = high ^ (_mixed(low ^ round_keys) & high_mask)
    return high << low_bits | low


def _mixed(words: Words) -> Words:
    """Apply the finaliser of splitmix64 (Steele et al. 2014): every input bit changes about half of the output."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _keys(base: np.uint64, numbers: Words) -> Words:
    """Derive a key for each number (of a block or an epoch)."""
    return _mixed(base + numbers * np.uint64(_GOLDEN))


def _text_key(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
