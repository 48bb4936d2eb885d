"""Estimated size of a job's state, in a checkpoint and in a worker's memory."""

from __future__ import annotations

import math
from fractions import Fraction

from pretrain_api.spec.job import PretrainJobSpec
from pretrain_api.spec.model import parameters, resolve
from pretrain_api.spec.replicas import replica_processes

STATE_BYTES = 12
"""Bytes of a parameter in a checkpoint: the parameter and AdamW's two moments in fp32."""
UNKNOWN_VOCABULARY = 131_072
"""Assumed embedding rows when only the tokeniser knows them: more than most have."""
STATES_KEPT = 2
"""States kept in memory: one is complete while the other is written."""
STATE_SPARE = 2 << 20
"""Bytes of metadata and padding for each state."""


def state_bytes(spec: PretrainJobSpec, vocabulary: int = UNKNOWN_VOCABULARY) -> int:
    """Compute an upper bound of a checkpoint's model and optimizer bytes; `vocabulary` is the tokeniser's."""
    model = resolve(spec.training.model)
    return STATE_BYTES * parameters(model, model.embedding_rows(vocabulary))


def memory_checkpoint_bytes(
    spec: PretrainJobSpec, vocabulary: int = UNKNOWN_VOCABULARY, processes: int | None = None
) -> int:
    """Compute an upper bound of a worker's memory that `checkpoint.memory` takes: 0 without it.

    A worker keeps the state of its processes (`processes`; absent: as in the spec): the whole state if it holds a
    replica of the model. Fully sharded state is divided among the workers, so the share is largest at `elastic.min`.
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
        # Stages have equal numbers of blocks; embeddings and head lie on the first and the last stage.
        model = resolve(spec.training.model).model_copy(update={"layers": 0})
        uneven = STATE_BYTES * parameters(model, model.embedding_rows(vocabulary))
    return STATES_KEPT * (math.ceil((whole - uneven) * share) + uneven + STATE_SPARE)
