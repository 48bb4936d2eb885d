"""Loss of the unigram model, which knows token frequencies only: a baseline for training losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain_trainer.datasets.corpus import TokenSource

SAMPLE_TOKENS = 2_000_000


def unigram_loss(sources: Sequence[TokenSource], weights: Sequence[float], vocabulary: int) -> float:
    """Return the entropy in nats of the token frequencies of the weighted mix.

    Counts at most the first SAMPLE_TOKENS of each source.
    """
    mix = np.zeros(vocabulary)
    for source, weight in zip(sources, weights, strict=True):
        counts = _counts(source, vocabulary)
        mix += weight / sum(weights) * counts / counts.sum()
    seen = mix[mix > 0]
    return float(-(seen * np.log(seen)).sum())


def _counts(source: TokenSource, vocabulary: int) -> np.ndarray:
    counts, wanted = np.zeros(vocabulary), SAMPLE_TOKENS
    for shard in source.shards:
        if not wanted:
            break
        tokens = shard()[:wanted]
        counts += np.bincount(tokens, minlength=vocabulary)
        wanted -= len(tokens)
    return counts
