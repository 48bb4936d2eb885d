"""Commit of an uploaded checkpoint, then retention."""

from __future__ import annotations

import logging

from pretrain_api.checkpoint.lineage import LineageRecord, Manifest, StoredObject, checkpoint_folder
from pretrain_api.spec.job import Retain
from pretrain_store.errors import HistoryError, StoreError
from pretrain_store.history import commit, read_listing, retire, sweep
from pretrain_store.lineage import Listing, later_record
from pretrain_store.port import ObjectStore
from pretrain_store.retention import plan_retention
from pretrain_trainer.checkpoint.dcp.layout import Layout
from pretrain_trainer.checkpoint.history.claim import timestamp
from pretrain_trainer.core.parallel_map import each
from pretrain_trainer.core.progress import TrainingProgress

_log = logging.getLogger(__name__)
_AT_ONCE = 2
"""Files uploaded at once: one is digested while the other one is written. More would slow the steps."""


def upload(store: ObjectStore, layout: Layout, generation: int, step: int) -> tuple[StoredObject, ...]:
    """Put the files of a layout; return them with keys relative to the checkpoint's folder."""
    folder = checkpoint_folder(generation, step)

    def put(name: str) -> StoredObject:
        item = store.put_file(f"{folder}/{name}", layout.folder / name)
        return item.model_copy(update={"key": name})

    at_once = _AT_ONCE if len(layout.files) > _AT_ONCE else 1  # a shard and the metadata are put one after the other
    return tuple(each(put, layout.files, at_once))


def commit_save(
    store: ObjectStore, record: LineageRecord, progress: TrainingProgress, objects: tuple[StoredObject, ...]
) -> Manifest:
    """Put the manifest of a save; raise StoreError or HistoryError. The same state may be committed twice."""
    manifest = Manifest(
        generation=record.generation,
        step=progress.step,
        tokens=progress.tokens,
        world_size=record.world_size,
        job_uid=record.job_uid,
        skipped=progress.skipped,
        slowed=progress.slowed,
        dropped=progress.dropped,
        watch=progress.watch,
        objects=objects,
        created_at=timestamp(),
    )
    commit(store, manifest)
    return manifest


class Retention:
    """Retention by the owner of a lineage record, until a later record supersedes it."""

    def __init__(self, store: ObjectStore, record: LineageRecord, retain: Retain) -> None:
        self._store = store
        self._record = record
        self._retain = retain
        self._listing: Listing | None = None
        self.superseded: str | None = None
        """Why this generation must stop, once a later record is found."""

    def apply(self) -> None:
        """Look for later records; if there is none, delete expired checkpoints and abandoned saves.

        A failure is logged only: the next save repeats it.
        """
        generation = self._record.generation
        try:
            first = self._listing is None
            self._listing = read_listing(self._store, self._listing)
            later = later_record(self._listing, generation)
            if later is not None:
                self.superseded = (
                    f"generation {later.generation} of job {later.job_uid or 'unknown'} continues this history: "
                    f"generation {generation} must stop"
                )
                return
            retire(self._store, plan_retention(self._listing, generation, self._retain))
            if first:
                sweep(self._store, generation)
        except (StoreError, HistoryError) as error:
            _log.warning("checkpoint retention failed: %s", error)
