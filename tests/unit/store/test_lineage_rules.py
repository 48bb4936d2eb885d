"""The rules of lineage, one by one: pure decisions over a listing."""

from __future__ import annotations

import pytest

from pretrain_api.checkpoint.lineage import MemoryState, StepRange, manifest_key
from pretrain_api.spec.job import Retain
from pretrain_store.errors import AllCheckpointsCorrupt, PrefixTakenOver
from pretrain_store.lineage import (
    LaterRecord,
    Listing,
    checkpoint_chain,
    is_chain_link,
    later_record,
    may_resume_from,
    refuse_foreign_job,
    rolled_back,
)
from pretrain_store.parent import ParentChoice, choose_parent, choose_rollback, inherited_interventions
from pretrain_store.retention import plan_retention
from support.store.values import a_listing, a_manifest, a_record, a_rollback


def places(*places: tuple[int, int]) -> tuple[str, ...]:
    return tuple(manifest_key(*place) for place in places)


CHAIN = a_listing(
    [a_record(1), a_record(2, (1, 20)), a_record(4, (2, 30))],
    [(1, 10), (1, 20), (1, 25), (2, 30), (2, 40), (4, 35), (4, 45)],
)
"""Generation 1 and 2 committed (1, 25) and (2, 40) after others had gone on from before: zombies."""


def test_the_line_is_the_chain_from_the_highest_record() -> None:
    assert checkpoint_chain(CHAIN) == places((4, 45), (4, 35), (2, 30), (1, 20), (1, 10))


def test_an_empty_prefix_has_an_empty_line_and_a_null_parent() -> None:
    assert checkpoint_chain(a_listing([], [])) == ()
    assert choose_parent(a_listing([], []), ()) == ParentChoice(parent=None, rejected=())


def test_a_record_without_checkpoints_leads_on_to_its_parent() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 10)), a_record(3, (1, 10))], [(1, 10), (1, 20)])

    assert checkpoint_chain(listing) == places((1, 10))


def test_a_parent_that_was_deleted_still_leads_on() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 10), (1, 30), (2, 40)])

    assert checkpoint_chain(listing) == places((2, 40), (1, 10))


def test_a_step_that_a_generation_saved_again_without_training_is_on_the_line_once() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 10))], [(1, 10), (2, 10)])
    assert checkpoint_chain(listing) == places((1, 10))

    named = a_listing([a_record(1), a_record(2, (1, 10)), a_record(3, (2, 10))], [(1, 5), (1, 10), (2, 10)])
    assert checkpoint_chain(named) == places((2, 10), (1, 5))


def test_the_parent_is_the_newest_of_the_line_that_nobody_rejected() -> None:
    assert choose_parent(CHAIN, ()) == ParentChoice(places((4, 45))[0], ())
    assert choose_parent(CHAIN, places((4, 45), (4, 35))).parent == places((2, 30))[0]


def test_what_a_record_rejected_stays_rejected() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 10), rejected=places((1, 20)))], [(1, 10), (1, 20)])

    assert choose_parent(listing, ()) == ParentChoice(places((1, 10))[0], rejected=places((1, 20)))
    with pytest.raises(AllCheckpointsCorrupt) as raised:
        choose_parent(listing, places((1, 10)))
    assert raised.value.rejected == places((1, 10), (1, 20))


def test_a_chain_with_none_left_falls_back_to_the_newest_of_any_lower_generation() -> None:
    on_the_line = places((4, 45), (4, 35), (2, 30), (1, 20), (1, 10))

    assert choose_parent(CHAIN, on_the_line).parent == places((2, 40))[0]
    assert choose_parent(CHAIN, (*on_the_line, *places((2, 40)))).parent == places((1, 25))[0]


def test_a_null_parent_needs_a_prefix_without_any_manifest() -> None:
    late = a_listing([a_record(1), a_record(2)], [(1, 10)])

    assert checkpoint_chain(late) == ()
    assert choose_parent(late, ()).parent == places((1, 10))[0]


def test_manifests_without_any_record_are_resumed_from() -> None:
    assert choose_parent(a_listing([], [(1, 10), (3, 5)]), ()).parent == places((3, 5))[0]


def test_an_unreadable_record_owns_its_number_and_its_checkpoints() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 20), (2, 30), (3, 40)], unreadable=[3])

    assert listing.highest == 3
    assert checkpoint_chain(listing) == places((3, 40))
    assert choose_parent(listing, ()).parent == places((3, 40))[0]
    assert later_record(listing, 2) == LaterRecord(3, None)


def test_behind_an_unreadable_record_the_chain_before_it_is_resumed_from() -> None:
    """Not the late commit (1, 30) of a zombie, which generation 2 had turned away from."""
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 20), (1, 30)], unreadable=[3])

    assert checkpoint_chain(listing) == ()
    assert choose_parent(listing, ()).parent == places((1, 20))[0]


def test_a_record_can_only_name_a_parent_of_a_lower_number() -> None:
    assert is_chain_link(2, a_record(2, (1, 10)))
    assert is_chain_link(2, a_record(2))
    assert not is_chain_link(3, a_record(2))
    assert not is_chain_link(2, a_record(2, (2, 10)))
    assert not is_chain_link(2, a_record(2).model_copy(update={"parent": "checkpoints/elsewhere"}))


def test_a_later_record_supersedes_and_a_readable_one_says_whose_it_is() -> None:
    listing = a_listing([a_record(1), a_record(2, job_uid="other")], [], unreadable=[3])

    assert later_record(listing, 1) == LaterRecord(2, "other")
    assert later_record(listing, 2) == LaterRecord(3, None)
    assert later_record(listing, 3) is None


def test_only_a_first_generation_takes_over_from_another_job() -> None:
    listing = a_listing([a_record(1, job_uid="mine"), a_record(2, job_uid="theirs")], [])

    refuse_foreign_job(listing, "mine", may_take_over=True)
    refuse_foreign_job(listing, "theirs", may_take_over=False)
    refuse_foreign_job(a_listing([], []), "mine", may_take_over=False)
    with pytest.raises(PrefixTakenOver, match="job theirs took over this prefix with generation 2"):
        refuse_foreign_job(listing, "mine", may_take_over=False)


def state_of(generation: int, step: int, nonce: str | None = None) -> MemoryState:
    """A state in memory of the generation whose record is `a_record(generation)`."""
    return MemoryState(generation=generation, nonce=nonce or a_record(generation).nonce, step=step)


def may_resume(
    listing: Listing, state: MemoryState, *, rejected: tuple[str, ...] = (), job_uid: str | None = None
) -> bool:
    choice = choose_parent(listing, rejected)
    return may_resume_from(listing, choice.parent, job_uid or a_record(1).job_uid, state)


def test_a_state_in_memory_is_resumed_from_when_it_is_the_newest_generations_own() -> None:
    assert may_resume(CHAIN, state_of(4, 47))
    assert may_resume(CHAIN, state_of(4, 45)), "the very step that was saved"
    assert may_resume(a_listing([a_record(1)], []), state_of(1, 5)), "before the first checkpoint"


def test_a_state_in_memory_that_is_behind_the_checkpoints_is_not_resumed_from() -> None:
    assert not may_resume(CHAIN, state_of(4, 44))


def test_the_state_of_a_dead_generation_or_of_another_process_or_job_is_never_resumed_from() -> None:
    assert not may_resume(CHAIN, state_of(2, 60)), "a zombie trained on"
    assert not may_resume(CHAIN, state_of(4, 47, nonce="another")), "the number was somebody else's"
    assert not may_resume(CHAIN, state_of(5, 47)), "it never entered the history"
    assert not may_resume(CHAIN, state_of(4, 47), job_uid="other")
    assert not may_resume(a_listing([], [(1, 10)]), state_of(1, 20)), "nobody's record says whose it is"
    assert not may_resume(a_listing([a_record(1)], [], unreadable=[2]), state_of(1, 20))


def test_a_second_failure_resumes_from_the_state_that_the_newest_record_names() -> None:
    resumed = a_record(5, (4, 45)).model_copy(update={"resumed": state_of(4, 47)})
    records = [*CHAIN.records.values(), resumed]
    manifests = [(1, 10), (1, 20), (2, 30), (4, 35), (4, 45)]

    assert may_resume(a_listing(records, manifests), state_of(4, 47))
    assert not may_resume(a_listing(records, manifests), state_of(4, 48)), (
        "a state that generation 5 did not go on from"
    )
    assert not may_resume(a_listing(records, [*manifests, (5, 46)]), state_of(4, 47)), "generation 5 has its own by now"


def test_a_state_in_memory_outlives_a_corrupt_checkpoint_of_its_line_but_not_the_line() -> None:
    assert may_resume(CHAIN, state_of(4, 47), rejected=places((4, 45)))
    on_the_line = places((4, 45), (4, 35), (2, 30), (1, 20), (1, 10))
    assert not may_resume(CHAIN, state_of(4, 47), rejected=on_the_line)


def one_generation(*steps: int) -> Listing:
    return a_listing([a_record(1)], [(1, step) for step in steps])


def test_retention_keeps_the_newest_and_the_multiples() -> None:
    plan = plan_retention(one_generation(10, 20, 30, 40, 50, 60), 1, Retain(last=2, every_steps=20))

    assert plan.checkpoints == places((1, 10), (1, 30))


def test_retention_keeps_what_is_pinned_and_pins_nothing_that_is_off_the_line() -> None:
    assert plan_retention(one_generation(10, 20, 30, 40, 50, 60), 1, Retain(last=2, pin=(20,))).checkpoints == places(
        (1, 10), (1, 30), (1, 40)
    )
    zombies = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 10), (1, 20), (1, 30), (2, 40), (2, 50)])
    assert plan_retention(zombies, 2, Retain(last=2, pin=(10, 30))).checkpoints == places((1, 30))


def test_retention_keeps_the_parent_of_the_highest_record() -> None:
    listing = a_listing([a_record(1), a_record(2, (1, 20))], [(1, 10), (1, 20), (2, 30), (2, 40), (2, 50)])

    assert plan_retention(listing, 2, Retain(last=2)).checkpoints == places((1, 10), (2, 30))


def test_rejected_checkpoints_do_not_count_among_those_kept() -> None:
    listing = a_listing(
        [a_record(1), a_record(2, (1, 20), rejected=places((1, 30)))], [(1, 10), (1, 20), (1, 30), (2, 40)]
    )

    assert plan_retention(listing, 2, Retain(last=2)).checkpoints == places((1, 10), (1, 30))
    chained = a_listing(
        [a_record(1), a_record(2, (1, 30), rejected=places((1, 20)))], [(1, 10), (1, 20), (1, 30), (2, 40)]
    )
    assert plan_retention(chained, 2, Retain(last=3)).checkpoints == places((1, 20))


def test_what_is_off_the_line_goes_once_the_line_has_two() -> None:
    assert plan_retention(CHAIN, 4, Retain(last=5)).checkpoints == places((1, 25), (2, 40))
    assert plan_retention(a_listing([a_record(1), a_record(2)], [(1, 10), (2, 5)]), 2, Retain(last=2)).checkpoints == ()


def test_what_the_own_generation_saved_off_the_line_is_left_to_the_next_one() -> None:
    records, places_there = [a_record(1), a_record(2, (1, 20))], [(1, 10), (1, 20), (2, 20)]

    assert plan_retention(a_listing(records, places_there), 2, Retain(last=2)).checkpoints == ()
    later = a_listing([*records, a_record(3, (1, 20))], places_there)
    assert plan_retention(later, 3, Retain(last=2)).checkpoints == places((2, 20))


def test_nobody_but_the_holder_of_the_highest_record_deletes() -> None:
    for listing, generation in ((CHAIN, 2), (CHAIN, 3), (CHAIN, 5)):
        assert plan_retention(listing, generation, Retain(last=2)).checkpoints == ()
    later_unreadable = a_listing(CHAIN.records.values(), [(4, 35), (4, 45), (1, 25)], unreadable=[5])
    assert plan_retention(later_unreadable, 4, Retain(last=2)).checkpoints == ()


def test_what_a_later_generation_committed_is_never_deleted() -> None:
    listing = a_listing([a_record(1)], [(1, 10), (1, 20), (2, 15), (2, 5)])

    assert plan_retention(listing, 1, Retain(last=2)).checkpoints == ()


def test_below_a_record_that_cannot_be_read_nothing_is_off_the_line() -> None:
    listing = a_listing(
        [a_record(1), a_record(3, (2, 40))],
        [(1, 10), (1, 20), (2, 30), (2, 40), (2, 50), (3, 60)],
        unreadable=[2],
    )

    assert checkpoint_chain(listing) == places((3, 60), (2, 40), (2, 30))
    assert plan_retention(listing, 3, Retain(last=2)).checkpoints == places((2, 30), (2, 50))


ROLLED_BACK = a_listing(
    [a_record(1), a_record(2, (1, 20), rollbacks=[a_rollback(2, 20, since=35)], skipped=[(30, 40)])],
    [(1, 10), (1, 20), (1, 30), (1, 40)],
)
"""Generation 2 is a rollback of generation 1, whose loss spiked at step 35."""


def test_a_rollback_leaves_behind_what_was_saved_after_the_step_that_it_goes_back_to() -> None:
    assert checkpoint_chain(ROLLED_BACK) == places((1, 20), (1, 10))
    assert rolled_back(ROLLED_BACK) == set(places((1, 30), (1, 40)))
    assert choose_parent(ROLLED_BACK, ()).parent == places((1, 20))[0]


def test_what_a_rollback_left_behind_is_not_even_a_last_resort() -> None:
    with pytest.raises(AllCheckpointsCorrupt) as raised:
        choose_parent(ROLLED_BACK, places((1, 10), (1, 20)))
    assert raised.value.rejected == places((1, 10), (1, 20))

    later = a_listing(
        [*ROLLED_BACK.records.values(), a_record(3, (1, 20), rollbacks=[a_rollback(2, 20)])],
        [(1, 20), (1, 30), (1, 40), (2, 30)],
    )
    assert choose_parent(later, places((1, 20))).parent == places((2, 30))[0]


def test_a_rollback_goes_back_to_the_newest_checkpoint_from_before_the_spike() -> None:
    before = a_listing([a_record(1)], [(1, 10), (1, 20), (1, 30), (1, 40)])

    assert choose_rollback(before, 35).parent == places((1, 30))[0]
    assert choose_rollback(before, 30).parent == places((1, 20))[0]
    assert choose_rollback(before, 10).parent is None


def test_where_a_rollback_led_to_another_one_the_next_goes_further_back_if_it_can() -> None:
    assert choose_rollback(ROLLED_BACK, 35).parent == places((1, 10))[0]
    only = a_listing(ROLLED_BACK.records.values(), [(1, 20), (1, 30)])
    assert choose_rollback(only, 35).parent == places((1, 20))[0]


def test_after_a_rollback_to_the_beginning_a_restart_begins_there_too() -> None:
    listing = a_listing([a_record(1), a_record(2, rollbacks=[a_rollback(2, 0, since=5)])], [(1, 10)])

    assert checkpoint_chain(listing) == ()
    assert choose_parent(listing, ()).parent is None


def test_retention_deletes_what_a_rollback_left_behind_once_the_line_has_two() -> None:
    grown = a_listing(ROLLED_BACK.records.values(), [(1, 20), (1, 30), (1, 40), (2, 30)])

    assert plan_retention(grown, 2, Retain(last=2)).checkpoints == places((1, 30), (1, 40))


def test_interventions_persist_whichever_checkpoint_a_generation_resumes_from() -> None:
    course = inherited_interventions(ROLLED_BACK, a_manifest(1, 10))

    assert course.skipped == (StepRange(first=30, last=40),)
    assert course.rollbacks == (a_rollback(2, 20, since=35),)
    assert inherited_interventions(ROLLED_BACK, None) == course


def test_what_a_checkpoint_has_trained_on_is_not_skipped_any_more() -> None:
    assert inherited_interventions(ROLLED_BACK, a_manifest(1, 34)).skipped == (StepRange(first=35, last=40),)
    assert inherited_interventions(ROLLED_BACK, a_manifest(1, 50)).skipped == ()
    trained = a_manifest(2, 34).model_copy(update={"skipped": (StepRange(first=30, last=40),)})
    assert inherited_interventions(ROLLED_BACK, trained).skipped == (StepRange(first=30, last=40),)
