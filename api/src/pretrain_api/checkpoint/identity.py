"""Identity of a run: the properties that runs must share to use one checkpoint history."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pretrain_api.checkpoint.lineage import JobIdentity
from pretrain_api.dataset import Dataset
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.training import Training


def job_identity(
    training: Training, resolved: ResolvedModel, datasets: Sequence[Dataset], tokenizer_digest: str
) -> JobIdentity:
    """Compute the identity; `datasets` are those of `training.data.sources`, in that order (else ValueError).

    Locations do not count: a copied or moved corpus is the same corpus.
    """
    sources = [
        {"name": source.name, "weight": source.weight, "shards": [shard.sha256 for shard in dataset.shards]}
        for source, dataset in zip(training.data.sources, datasets, strict=True)
    ]
    model = model_fields(resolved, resolved.embedding_rows(datasets[0].vocabulary))
    return JobIdentity(
        model=model,
        model_digest=_digest(model),
        data_digest=_digest(sources),
        tokenizer_digest=tokenizer_digest,
        seed=training.seed,
        batch_sequences=training.batch.sequences,
        context=resolved.context,
    )


def model_fields(resolved: ResolvedModel, rows: int) -> dict[str, Any]:
    """Return a model's fields as stored with its checkpoints, by users' names; `rows` are those of the embedding."""
    added = {"norm": "pre"}  # Fields added later: their former implicit value changes no digest.
    return {name: value for name, value in resolved.model_dump(mode="json").items() if added.get(name) != value} | {
        "vocabulary": rows
    }


def model_digest(resolved: ResolvedModel, rows: int) -> str:
    """Compute `JobIdentity.model_digest`."""
    return _digest(model_fields(resolved, rows))


def differences(found: JobIdentity, wanted: JobIdentity) -> tuple[str, ...]:
    """List the fields in which two identities differ, by users' names such as `training.model`."""
    fields = {
        "model_digest": "training.model",
        "data_digest": "training.data.sources",
        "tokenizer_digest": "training.data.tokenizer",
        "seed": "training.seed",
        "batch_sequences": "training.batch.sequences",
        "context": "training.model.context",
        "version": "the format's version",
    }
    return tuple(text for name, text in fields.items() if getattr(found, name) != getattr(wanted, name))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
