"""When the liveness probe fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain_operator.kubernetes.server.health import (
    BEAT_SECONDS,
    REMEMBERED_SECONDS,
    Heartbeat,
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
        (replace(WELL, lag=5.1), "event loop was late by 5.1 s"),
        (replace(WELL, silences={"pods": 91.0}), "nothing was heard of pods for 91 s"),
        (replace(WELL, oldest_wait=61.0), "a job waits to be looked at for 61 s"),
    ],
)
def test_what_is_wrong_is_said(ill: Vitals, says: str) -> None:
    with pytest.raises(Unhealthy, match=says):
        check(ill)


def test_a_loop_that_stood_still_is_late_for_a_while() -> None:
    now = 100.0
    heartbeat = Heartbeat(lambda: now)
    now += BEAT_SECONDS
    heartbeat.beat()
    assert heartbeat.lag == 0.0

    now += BEAT_SECONDS + 7.0
    assert heartbeat.lag == pytest.approx(7.0)

    heartbeat.beat()
    now += BEAT_SECONDS
    heartbeat.beat()
    assert heartbeat.lag == pytest.approx(7.0)

    for _ in range(int(REMEMBERED_SECONDS / BEAT_SECONDS)):
        now += BEAT_SECONDS
        heartbeat.beat()
    assert heartbeat.lag == 0.0
