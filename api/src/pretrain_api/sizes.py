"""How large a job's state is, and what of it a worker keeps in memory: before anything is started."""

from __future__ import annotations

from pretrain_api.job import PretrainJobSpec
from pretrain_api.model import parameters, resolve

STATE_BYTES = 12
"""Of a parameter in a checkpoint: itself and AdamW's two moments in fp32."""
UNKNOWN_VOCABULARY = 131_072
"""Rows of the embedding where only the tokeniser knows them: more than most have."""
STATES_KEPT = 2
"""Of checkpoints in memory: one is whole while the other is written."""
STATE_SPARE = 2 << 20
"""Bytes beside each state: metadata and padding."""


def state_bytes(spec: PretrainJobSpec, vocabulary: int = UNKNOWN_VOCABULARY) -> int:
    """Bytes of model and optimizer in a checkpoint, at most; `vocabulary` is that of the tokeniser."""
    model = resolve(spec.training.model)
    return STATE_BYTES * parameters(model, model.embedding_rows(vocabulary))


def remembered_bytes(spec: PretrainJobSpec, vocabulary: int = UNKNOWN_VOCABULARY) -> int:
    """Bytes of a worker's memory that `checkpoint.memory` takes, at most: 0 without it.

    Replicated state is kept whole by every worker; of fully sharded state each keeps its share, the largest when the
    fewest workers train.
    """
    if spec.checkpoint.memory is None:
        return 0
    shares = spec.workers.elastic.min if spec.training.parallelism.shard == "full" else 1
    return STATES_KEPT * (-(-state_bytes(spec, vocabulary) // shares) + STATE_SPARE)
