"""When the liveness probe fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain_operator.kubernetes.server.health import (
    LAG_MEMORY_SECONDS,
    LAG_PERIOD_SECONDS,
    LoopLag,
    Unhealthy,
    Vitals,
    check,
)

WELL = Vitals(lag=0.1, silences={"pods": 30.0, "nodes": 1.0}, oldest_wait=2.0)


def test_a_process_in_order_is_left_alone() -> None:
    check(WELL)


@pytest.mark.parametrize(
    ("ill", "says"),
    [
        (replace(WELL, lag=5.1), "event loop lag 5.1 s"),
        (replace(WELL, silences={"pods": 91.0}), "watch of pods silent for 91 s"),
        (replace(WELL, oldest_wait=61.0), "a job has waited 61 s for a reconcile"),
    ],
)
def test_what_is_wrong_is_said(ill: Vitals, says: str) -> None:
    with pytest.raises(Unhealthy, match=says):
        check(ill)


def test_a_loop_that_stood_still_is_late_for_a_while() -> None:
    now = 100.0
    lag = LoopLag(lambda: now)
    now += LAG_PERIOD_SECONDS
    lag.tick()
    assert lag.seconds == 0.0

    now += LAG_PERIOD_SECONDS + 7.0
    assert lag.seconds == pytest.approx(7.0)

    lag.tick()
    now += LAG_PERIOD_SECONDS
    lag.tick()
    assert lag.seconds == pytest.approx(7.0)

    for _ in range(int(LAG_MEMORY_SECONDS / LAG_PERIOD_SECONDS)):
        now += LAG_PERIOD_SECONDS
        lag.tick()
    assert lag.seconds == 0.0
