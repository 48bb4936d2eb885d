"""The operator, or the store, goes away: training does not notice, or waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from support.kubernetes.kind_jobs import STEPS, Place

Losses = Callable[[], dict[int, float]]
OUTAGE_SECONDS = 60.0


@pytest.mark.core
def test_the_operator_deleted_in_the_middle_of_a_run_costs_nothing(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    step = job.wait_for_step(30).step

    gone = place.cluster.kill_active_operator()
    job.wait_for_step(step + 20)

    assert place.cluster.active_operator() != gone
    status = job.wait_for_phase("Succeeded", timeout=700)
    assert status.incidents == ()
    assert [generation.number for generation in status.generations] == [1]
    assert job.losses_match(undisturbed())


def test_the_operator_deleted_in_the_middle_of_a_recovery_delays_it_only(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with job.fault("pod and operator deleted by force"):
        job.delete_worker(0, force=True)
        place.cluster.kill_active_operator()
    job.wait_for_workers(3)

    job.wait_for_phase("Succeeded", timeout=700)
    assert job.losses_match(undisturbed())


def test_a_store_that_is_away_for_a_minute_ends_nothing(place: Place, undisturbed: Losses) -> None:
    job = place.apply(changes={"spec.training.steps": 4 * STEPS})
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with place.cluster.s3_stopped():
        time.sleep(OUTAGE_SECONDS)  # the length of the outage is the fault itself
        assert job.status.phase == "Training"

    status = job.wait_for_phase("Succeeded", timeout=700)
    assert status.incidents == ()
    assert job.losses_match(undisturbed())
