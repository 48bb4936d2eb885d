"""How the ranks of a generation enter its history together where states are kept in memory."""

from __future__ import annotations

from collections.abc import Callable

from pretrain_api.lineage import MemoryState
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.agreement import Agreement
from pretrain_trainer.checkpoint.opening import Applicant, Entry, Refusal, Survey, put, survey
from pretrain_trainer.checkpoint.recall import Account, Recall, Worker, choose, damaged


def enter_remembering(
    store: ObjectStore | None, applicant: Applicant, look: Callable[[], None], worker: Worker
) -> Entry | Refusal | None:
    """As `enter`, on all ranks: before the first one puts the record, all say what they have, and verify what is
    chosen of it. `store` is the first rank's alone, which returns what all are told. Collective.
    """
    agreement = Agreement(None)
    seals = tuple(seal for _, seal in worker.found()) if worker.speaks else ()
    accounts = agreement.all_say(Account(worker.first, seals))
    found = survey(store, applicant, look) if store is not None else None
    recall: Recall | None = None
    if any(said.seals for said in accounts):
        allowed = agreement.first_says(_allowed(found, applicant, accounts))
        recall = choose(accounts, allowed.__contains__)
        if recall is not None:
            bad = agreement.all_say(damaged(worker, recall))
            recall = recall.without(pair for pairs in bad for pair in pairs)
    if store is None or not isinstance(found, Survey):
        return found if isinstance(found, Refusal) else None
    return put(store, applicant, found, recall)


def _allowed(found: Survey | Refusal | None, applicant: Applicant, accounts: list[Account]) -> tuple[MemoryState, ...]:
    if not isinstance(found, Survey):
        return ()
    states = (seal.state for said in accounts for seal in said.seals)
    return tuple(state for state in states if found.allows(applicant.job_uid, state))
