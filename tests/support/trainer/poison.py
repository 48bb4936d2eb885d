"""A text, and the same text with garbage in what some steps read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain_trainer.datasets.order import MIX_BLOCK, DataOrder, MixSource
from support.trainer.world import VOCABULARY, a_source, a_tokenizer, walk

CONTEXT, SEQUENCES, STEPS, EVERY = 16, 8, 60, 10
POISON = range(40, 48)
"""The steps of data that hold garbage: a checkpoint comes after the first of them."""

JOB = f"""\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata: {{name: poisoned}}
spec:
  workers: {{replicas: 2, elastic: {{min: 1, max: 2}}}}
  training:
    model: {{family: gpt2, layers: 1, heads: 2, width: 32, context: {CONTEXT}}}
    data:
      tokenizer: tokenizer.json
      sources: [{{name: prose, uri: poisoned, weight: 1}}]
    steps: {STEPS}
    seed: 0
    batch: {{sequences: {SEQUENCES}, microBatch: 2}}
    optimizer: {{learningRate: 1e-2}}
    schedule: {{kind: constant, warmupSteps: 2}}
    precision: fp32
  checkpoint:
    storage: {{path: checkpoints}}
    interval: {{steps: {EVERY}}}
  recovery:
    divergence: {{skipSteps: 16}}
"""


def a_poisoned_corpus(folder: Path) -> Path:
    """The sources `clean` and `poisoned`, their tokeniser and a job file. No window comes twice: a block of the mix has
    one epoch."""
    digest = a_tokenizer(folder)
    tokens = walk(1, MIX_BLOCK * CONTEXT + 1)
    a_source(folder, "clean", [tokens], digest)
    a_source(folder, "poisoned", [_poisoned(tokens)], digest)
    (folder / "job.yaml").write_text(JOB)
    return folder


def _poisoned(tokens: np.ndarray) -> np.ndarray:
    """The tokens with garbage in those windows that the steps of POISON read."""
    windows = (len(tokens) - 1) // CONTEXT
    order = DataOrder([MixSource("prose", 1.0, windows)], SEQUENCES, seed=0)
    random, spoilt = np.random.default_rng(9), tokens.copy()
    for step in POISON:
        for window in order.of_step(step, (), range(SEQUENCES)).windows:
            first = int(window) * CONTEXT
            spoilt[first : first + CONTEXT] = random.integers(0, VOCABULARY, CONTEXT)
    return spoilt
