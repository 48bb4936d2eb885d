"""How the ranks of a generation enter its history together, or go back in it, where states are kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pretrain_api.checkpoint.lineage import LineageRecord, MemoryState
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.history.claim import Applicant, Entry, Refusal, Survey, put, survey
from pretrain_trainer.checkpoint.memory.plan import Account, Recall, Worker, choose, damaged
from pretrain_trainer.core.collectives import Collectives


def enter_remembering(
    store: ObjectStore | None, applicant: Applicant, look: Callable[[], None], worker: Worker
) -> Entry | Refusal | None:
    """As `enter`, on all ranks: before the first one puts the record, all say what they have, and verify what is
    chosen of it. `store` is the first rank's alone, which returns what all are told. Collective.
    """
    collectives = Collectives(None)
    accounts = _accounts(collectives, worker)
    found = survey(store, applicant, look) if store is not None else None
    recall: Recall | None = None
    if any(said.seals for said in accounts):
        allowed = collectives.broadcast_object(_allowed(found, applicant, accounts))
        recall = _intact(collectives, worker, accounts, allowed.__contains__)
    if store is None or not isinstance(found, Survey):
        return found if isinstance(found, Refusal) else None
    return put(store, applicant, found, recall)


def own_state_before(step: int, record: LineageRecord, worker: Worker) -> Recall | None:
    """The newest whole state that the record's generation kept in memory before this step was done. Collective."""

    def allowed(state: MemoryState) -> bool:
        return state.step < step and (state.generation, state.nonce) == (record.generation, record.nonce)

    collectives = Collectives(None)
    return _intact(collectives, worker, _accounts(collectives, worker), allowed)


def _accounts(collectives: Collectives, worker: Worker) -> list[Account]:
    seals = tuple(seal for _, seal in worker.found()) if worker.speaks else ()
    return collectives.all_gather_object(Account(worker.first, seals))


def _intact(
    collectives: Collectives, worker: Worker, accounts: Sequence[Account], allowed: Callable[[MemoryState], bool]
) -> Recall | None:
    """The newest state that is allowed, if its files are what was sealed."""
    recall = choose(accounts, allowed)
    if recall is None:
        return None
    bad = collectives.all_gather_object(damaged(worker, recall))
    return recall.without(pair for pairs in bad for pair in pairs)


def _allowed(
    found: Survey | Refusal | None, applicant: Applicant, accounts: Sequence[Account]
) -> tuple[MemoryState, ...]:
    if not isinstance(found, Survey):
        return ()
    states = (seal.state for said in accounts for seal in said.seals)
    return tuple(state for state in states if found.allows(applicant.job_uid, state))
