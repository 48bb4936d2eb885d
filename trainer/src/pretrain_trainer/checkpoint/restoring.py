"""Fetching a checkpoint: only what this process needs, every digest checked, nothing loaded yet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from pretrain_api.lineage import Manifest, checkpoint_folder, manifest_key
from pretrain_store.errors import Corrupt, Missing
from pretrain_store.history import verify
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.layout import METADATA
from pretrain_trainer.checkpoint.loading import Loading, Unusable, read_metadata, scalars
from pretrain_trainer.checkpoint.state import make_optimizer_state, optimizer_entries, tensors_of
from pretrain_trainer.errors import InvalidInput

DAMAGED = (Corrupt, Missing, Unusable)
"""Errors that no retry mends: the checkpoint is passed over."""
_PARALLEL = 4
_ENTRIES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


def fetch(
    store: ObjectStore, manifest: Manifest, folder: Path, model: nn.Module, optimizer: Optimizer, kind: str
) -> Loading:
    """Fetch to `folder` and verify what holds this process's tensors, for which the optimizer gets room.

    Raises one of DAMAGED; InvalidInput when it is the state of another kind of optimizer; StoreError.
    """
    _fetch(store, manifest, folder, (METADATA,))
    metadata = read_metadata((folder / METADATA).read_bytes())
    entries = optimizer_entries(metadata.state_dict_metadata, model)
    _refuse_other_optimizer({entry for found in entries.values() for entry in found}, kind, manifest)
    make_optimizer_state(model, optimizer, entries, scalars(metadata))
    loading = Loading(tensors_of(model, optimizer), metadata)
    _fetch(store, manifest, folder, loading.files)
    return loading


def _fetch(store: ObjectStore, manifest: Manifest, folder: Path, names: tuple[str, ...]) -> None:
    wanted = manifest.model_copy(
        update={"objects": tuple(item for item in manifest.objects if item.key in names)}
    )  # fmt: skip
    missing = set(names) - {item.key for item in wanted.objects}
    if missing:
        raise Unusable(f"its manifest does not name {min(missing)}")
    prefix = checkpoint_folder(manifest.generation, manifest.step)
    fetched = [(f"{prefix}/{name}", folder / name) for name in names]
    if len(fetched) == 1:
        store.fetch(*fetched[0])
    else:
        with ThreadPoolExecutor(max_workers=_PARALLEL) as threads:
            list(threads.map(lambda pair: store.fetch(*pair), fetched))
    verify(wanted, folder)


def _refuse_other_optimizer(found: set[str], kind: str, manifest: Manifest) -> None:
    if found and found != _ENTRIES[kind]:
        key = manifest_key(manifest.generation, manifest.step)
        raise InvalidInput(
            f"training.optimizer.kind: checkpoint {key} holds the state of another optimizer than {kind}; "
            "change it back, or start anew under another path or prefix in checkpoint.storage"
        )
