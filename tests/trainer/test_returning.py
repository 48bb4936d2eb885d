"""Target of a rollback: a checkpoint, or a later snapshot in the memory of workers."""

from __future__ import annotations

import pytest

from pretrain_api.checkpoint.lineage import LossMemory, MemoryState, manifest_key
from pretrain_api.spec.job import Divergence
from pretrain_store.history import put_record
from pretrain_trainer.checkpoint.history.claim import LineageEntry
from pretrain_trainer.checkpoint.history.rollback import RollbackClaim
from pretrain_trainer.checkpoint.memory.plan import MemorySnapshot
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.stability.detector import StepVerdict
from pretrain_trainer.stability.guard import RollbackRequest
from support.store.values import MemoryStore, a_record, a_rollback, save


@pytest.mark.parametrize(
    ("tried", "remembered", "to_step"),
    [
        (None, 38, 38),
        (None, 30, 30),  # the checkpoint has it, too
        (None, None, 30),
        (20, 38, 38),  # other trouble, before the checkpoint
        (33, 38, 30),  # what comes after 33 descends from it, and may have the trouble in it
        (30, 38, 20),
    ],
)
def test_of_a_checkpoint_and_a_state_in_memory_the_later_one_is_gone_back_to_once(
    tried: int | None, remembered: int | None, to_step: int
) -> None:
    store = MemoryStore()
    rollbacks = () if tried is None else (a_rollback(2, tried),)
    saver = 2 if tried == 20 else 1  # the generation that took the checkpoint of step 30
    put_record(store, a_record(1))
    save(store, 1, 20)
    save(store, saver, 30)
    holder = a_record(2, parent=(1, 20 if saver == 2 else 30), rollbacks=rollbacks)
    put_record(store, holder)
    state = MemoryState(generation=2, nonce=holder.nonce, step=remembered or 0)
    snapshot = MemorySnapshot(TrainingProgress(state.step), state, ((0,),), (0,)) if remembered else None
    wish = RollbackRequest(StepVerdict("spike", 41, 40, LossMemory()), Divergence(), ())

    entry = RollbackClaim(store, holder, wish, snapshot).enter()

    assert isinstance(entry, LineageEntry)
    taken = snapshot if to_step == remembered and to_step != 30 else None
    assert (entry.record.rollbacks[-1].to_step, entry.snapshot) == (to_step, taken)
    assert entry.record.resumed == (state if taken else None)
    assert entry.record.parent == (manifest_key(1, 20) if to_step == 20 else manifest_key(saver, 30))
