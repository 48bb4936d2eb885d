"""How large a job's state is, and what of it a worker keeps in memory: before anything is started."""

from __future__ import annotations

import math
from fractions import Fraction

from pretrain_api.spec.job import PretrainJobSpec
from pretrain_api.spec.model import parameters, resolve
from pretrain_api.spec.replicas import replica_processes

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


def remembered_bytes(spec: PretrainJobSpec, vocabulary: int = UNKNOWN_VOCABULARY, processes: int | None = None) -> int:
    """Bytes of a worker's memory that `checkpoint.memory` takes, at most: 0 without it.

    A worker keeps what its processes (absent: as the spec says) have: all of the state where a replica of the model and
    its shards lie within it. Of fully sharded state each keeps its share, the largest when the fewest workers train.
    """
    if spec.checkpoint.memory is None:
        return 0
    parallelism, held = spec.training.parallelism, processes or spec.workers.processes_per_worker or 1
    share = {
        "none": min(Fraction(1), Fraction(held, replica_processes(parallelism))),
        "full": Fraction(1, spec.workers.elastic.min),
        "hybrid": Fraction(1),
    }[parallelism.shard]
    whole, uneven = state_bytes(spec, vocabulary), 0
    if parallelism.pipeline > 1:
        # Stages have as many blocks each; what is beside the blocks lies on the first and the last.
        model = resolve(spec.training.model).model_copy(update={"layers": 0})
        uneven = STATE_BYTES * parameters(model, model.embedding_rows(vocabulary))
    return STATES_KEPT * (math.ceil((whole - uneven) * share) + uneven + STATE_SPARE)
