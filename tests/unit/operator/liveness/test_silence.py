"""The clock of silence: what an agent's silence proves, and what it does not."""

from __future__ import annotations

import pytest

from pretrain_operator.liveness.silence import SilenceClock

NOON = 1000.0
ALLOWANCE = 2.0


@pytest.mark.parametrize(
    ("clock", "own_fault"),
    [
        (SilenceClock(heard_at=NOON - 1), False),
        (SilenceClock(heard_at=NOON - 2), False),
        (SilenceClock(heard_at=NOON - 2.1), True),
        (SilenceClock(heard_at=None), True),
        (SilenceClock(heard_at=NOON).with_grace(NOON + 1), True),
        (SilenceClock(heard_at=NOON).with_grace(NOON), False),
        (SilenceClock(heard_at=NOON).with_grace(NOON + 1).with_grace(NOON - 1), True),
    ],
    ids=[
        "an agent is heard", "heard at the edge of the allowance", "no agent is heard any more",
        "no agent is connected",
        "agents may be reconnecting", "the grace period is over", "a shorter grace period does not end a longer one",
    ],
)  # fmt: skip
def test_silence_is_the_observers_fault_while_no_agent_is_heard_or_agents_reconnect(
    clock: SilenceClock, own_fault: bool
) -> None:
    assert clock.is_own_fault(NOON, ALLOWANCE) == own_fault
    assert clock.silence(NOON - 60, NOON, ALLOWANCE) == (0 if own_fault else 60)


def test_absence_counts_from_the_observers_last_interruption() -> None:
    steady = SilenceClock()
    interrupted = steady.interrupted(NOON - 10)

    assert steady.absence(NOON - 60, NOON) == 60
    assert interrupted.absence(NOON - 60, NOON) == 10
    assert interrupted.absence(NOON - 5, NOON) == 5


@pytest.mark.parametrize(
    ("woke_late_by", "interrupted"), [(0.0, False), (5.0, False), (5.1, True), (float("-inf"), False)]
)
def test_only_a_late_wake_up_is_an_interruption(woke_late_by: float, interrupted: bool) -> None:
    clock = SilenceClock().overslept(due=NOON - woke_late_by, now=NOON, late_after=5.0)

    assert (clock.healthy_since == NOON) == interrupted


def test_an_outage_that_other_agents_outlasted_is_not_the_observers() -> None:
    clock = SilenceClock(heard_at=NOON)

    assert clock.outlasted(NOON - 0.1)
    assert not clock.outlasted(NOON)
    assert not SilenceClock().outlasted(NOON - 0.1)
