"""State of each checkpoint of a history."""

from __future__ import annotations

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_store.checkpoint_state import CheckpointState, checkpoint_states
from support.store.values import a_listing, a_record, a_rollback


def test_the_newest_of_the_chain_is_current() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 10), (1, 20), (2, 30)])

    assert checkpoint_states(listing) == {
        manifest_key(1, 10): CheckpointState.IN_LINEAGE,
        manifest_key(1, 20): CheckpointState.IN_LINEAGE,
        manifest_key(2, 30): CheckpointState.CURRENT,
    }


def test_what_a_replaced_generation_committed_late_is_off_the_line() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 20), (1, 30)])

    assert checkpoint_states(listing) == {
        manifest_key(1, 20): CheckpointState.CURRENT,
        manifest_key(1, 30): CheckpointState.NOT_IN_LINEAGE,
    }


def test_what_was_found_corrupt_is_not_current() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 10), rejected=[manifest_key(1, 20)])], [(1, 10), (1, 20)])

    assert checkpoint_states(listing) == {
        manifest_key(1, 10): CheckpointState.CURRENT,
        manifest_key(1, 20): CheckpointState.REJECTED,
    }


def test_what_a_rollback_left_behind_is_given_up() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 10), rollbacks=[a_rollback(2, 10)])], [(1, 10), (1, 20)])

    assert checkpoint_states(listing) == {
        manifest_key(1, 10): CheckpointState.CURRENT,
        manifest_key(1, 20): CheckpointState.GIVEN_UP,
    }


def test_where_all_are_corrupt_none_is_current() -> None:
    listing = a_listing([a_record(1), a_record(2, rejected=[manifest_key(1, 10)])], [(1, 10)])

    assert checkpoint_states(listing) == {manifest_key(1, 10): CheckpointState.REJECTED}
