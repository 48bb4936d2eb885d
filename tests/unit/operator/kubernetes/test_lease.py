"""One holder at a time, each with a higher epoch, whatever processes, clocks and connections do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.worlds.lease import Clock, Fate, World


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def holder_of(world: World) -> str:
    [name] = [candidate.name for candidate in world.candidates if candidate.lease.held]
    return name


def test_the_first_takes_a_lease_that_nobody_made_and_keeps_it(world: World) -> None:
    world.candidate("a")
    world.run(until=1)
    world.candidate("b")

    world.run(until=600)

    assert [name for _, name, _ in world.epochs] == ["a"]
    assert holder_of(world) == "a"
    assert not world.lost


def test_who_crashes_is_followed_within_five_seconds(world: World) -> None:
    world.candidate("a")
    world.run(until=1)
    world.candidate("b")
    for thousandth in range(0, 1000, 50):
        crash = world.time + 10 + thousandth / 1000
        before = holder_of(world)
        world.run(until=crash)
        world.candidates[before == "b"].crash()
        world.run(until=crash + 5)

        assert holder_of(world) != before
        world.candidates[before == "b"].restart()


def test_who_crashes_with_its_machine_is_followed_within_half_the_duration() -> None:
    world = World(answers=())
    world.candidate("a")
    world.run(until=1)
    world.candidate("b")
    world.run(until=10.3)
    world.candidates[0].crash()

    world.run(until=12.4)

    assert holder_of(world) == "b"
    world.close()


def test_nobody_takes_over_from_one_that_renews_though_its_machine_takes_no_connections() -> None:
    world = World(answers=())
    world.candidate("a")
    world.run(until=1)
    world.candidate("b")

    world.run(until=600)

    assert [name for _, name, _ in world.epochs] == ["a"]
    world.close()


def test_a_process_that_starts_where_the_holder_was_knows_that_it_is_gone(world: World) -> None:
    holder = world.candidate("a")
    world.run(until=10.3)
    holder.restart()

    world.run(until=12.4)

    assert [name for _, name, _ in world.epochs] == ["a", "a"]


def test_a_holder_that_cannot_renew_for_a_while_only_waits_with_its_writes() -> None:
    world = World([Fate(), Fate(), *[Fate(lost="call", heard=False)] * 2])
    holder = world.candidate("a")
    held = []
    for quarter in range(1, 24):
        world.run(until=quarter / 4)
        held.append(holder.lease.held)

    assert False in held
    assert held[-1]
    assert not world.lost
    assert len(world.epochs) == 1
    world.close()


def test_who_lets_go_is_followed_at_once(world: World) -> None:
    first = world.candidate("a")
    world.run(until=1)
    world.candidate("b")
    world.run(until=10.3)
    first.leave()

    world.run(until=11)

    assert holder_of(world) == "b"


def test_epochs_rise_with_every_change_of_holder(world: World) -> None:
    first = world.candidate("a")
    world.run(until=1)
    first.restart()  # the same identity
    world.run(until=10)
    first.leave()
    world.run(until=12)
    first.restart()
    world.run(until=13)

    epochs = [epoch for _, _, epoch in world.epochs]
    assert epochs == [epochs[0], epochs[0] + 1, epochs[0] + 2]


def test_a_process_with_the_holders_identity_is_another_one(world: World) -> None:
    world.candidate("a")
    world.run(until=1)
    world.candidate("a")

    world.run(until=60)

    assert len(world.epochs) == 1


def test_epochs_rise_though_the_lease_was_deleted(world: World) -> None:
    first = world.candidate("a")
    world.run(until=3600)
    first.restart()
    world.run(until=3610)
    world.lease = None

    world.run(until=3620)

    epochs = [epoch for _, _, epoch in world.epochs]
    assert len(epochs) == 3
    assert epochs == sorted(set(epochs))


def test_a_lease_that_is_deleted_is_lost(world: World) -> None:
    world.candidate("a")
    world.run(until=10)
    world.lease = None

    world.run(until=11.5)

    assert [name for _, name in world.lost] == ["a"]


def test_a_holder_that_cannot_renew_stops_before_another_takes_over() -> None:
    fates = [Fate(), Fate(), *[Fate(lost="call", heard=False)] * 100]  # found none, made it, and then nothing
    world = World(fates)
    world.candidate("a")

    world.run(until=4)

    [(lost_at, _)] = world.lost
    assert lost_at < 3.1
    world.close()


def test_a_holder_that_was_stopped_for_long_knows_when_it_goes_on(world: World) -> None:
    first = world.candidate("a")
    world.run(until=1)
    world.candidate("b")
    world.run(until=10)
    first.stop(30)
    world.run(until=30)
    assert holder_of(world) == "b"
    assert not world.lost

    world.run(until=40.0)

    assert world.lost == [(40.0, "a")]
    assert holder_of(world) == "b"


def test_the_time_that_an_answer_took_is_no_time_to_hold() -> None:
    made, renewed = Fate(back=0.9), Fate(back=0.9)
    for fates, sent in (([Fate(), made], 0.0), ([Fate(), Fate(), renewed], 1.0)):
        world = World([*fates, *[Fate(lost="call")] * 100])
        world.candidate("a")

        world.run(until=sent + 4)

        [(lost_at, _)] = world.lost
        assert lost_at < sent + 3.1
        world.close()


def test_a_holder_that_was_stopped_for_long_does_not_renew(world: World) -> None:
    holder = world.candidate("a")
    world.run(until=10)
    before = world.lease
    holder.stop(20)

    world.run(until=31)

    assert world.lost == [(30.0, "a")]
    assert world.lease == before


def test_who_was_pushed_out_by_its_own_name_has_lost(world: World) -> None:
    world.candidate("a")
    world.run(until=10)
    assert world.lease is not None
    spec = world.lease["spec"]
    world.write({**world.lease, "spec": {**spec, "leaseTransitions": spec["leaseTransitions"] + 1}})

    world.run(until=11.5)

    assert [name for _, name in world.lost] == ["a"]


def test_a_renewal_whose_answer_was_lost_changes_nothing() -> None:
    world = World([Fate(), Fate(), Fate(), Fate(lost="answer"), Fate(), Fate(), Fate(lost="answer", heard=False)])
    world.candidate("a")

    world.run(until=30)

    assert len(world.epochs) == 1
    assert not world.lost
    world.close()


def test_a_change_by_a_person_changes_nothing(world: World) -> None:
    world.candidate("a")
    world.run(until=1)
    for second in range(2, 30):
        world.run(until=second + 0.5)
        assert world.lease is not None
        world.write({**world.lease, "spec": {**world.lease["spec"], "renewTime": "1999-01-01T00:00:00.000000Z"}})

    assert len(world.epochs) == 1
    assert not world.lost


def test_clocks_elsewhere_do_not_matter(world: World) -> None:
    world.candidate("a", Clock(wall=timedelta(days=-3000)))
    world.run(until=1)
    world.candidate("b", Clock(wall=timedelta(days=3000), offset=1e6))

    world.run(until=60)

    assert [name for _, name, _ in world.epochs] == ["a"]


FATES = st.builds(
    Fate,
    there=st.floats(0.001, 6),
    back=st.floats(0.001, 2),
    lost=st.sampled_from(["", "", "call", "answer"]),
    heard=st.booleans(),
)
GOOD_FATES = st.builds(Fate, there=st.floats(0.001, 0.1), back=st.floats(0.001, 0.1))
CLOCKS = st.builds(
    Clock,
    offset=st.floats(0, 1000),
    rate=st.floats(0.93, 1.07),
    wall=st.integers(-1000, 1000).map(lambda seconds: timedelta(seconds=seconds)),
)
TROUBLE = st.tuples(
    st.floats(0, 4), st.integers(0, 2), st.sampled_from(["stop", "restart", "leave", "none"]), st.floats(0, 10)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(GOOD_FATES, GOOD_FATES, FATES), max_size=150),
    st.tuples(CLOCKS, CLOCKS, CLOCKS),
    st.lists(TROUBLE, max_size=25),
    st.lists(st.booleans(), max_size=100),
)
def test_two_never_hold_together_epochs_rise_and_in_the_end_one_holds(
    fates: list[Fate],
    clocks: tuple[Clock, ...],
    troubles: list[tuple[float, int, str, float]],
    answers: list[bool],
) -> None:
    world = World(fates, answers)
    for name, clock in zip("abb", clocks, strict=True):  # two have one identity
        world.candidate(name, clock)
    for wait, who, what, seconds in troubles:
        world.run(until=world.time + wait)
        match what:
            case "stop":
                world.candidates[who].stop(seconds)
            case "restart":
                world.candidates[who].restart()
            case "leave":
                world.candidates[who].leave()
            case _:
                pass
    world.calm()
    for candidate in world.candidates:
        candidate.restart()
    world.run(until=world.time + 15)

    epochs = [epoch for _, _, epoch in world.epochs]
    assert all(after > before for before, after in pairwise(epochs))
    assert holder_of(world)
    world.close()
