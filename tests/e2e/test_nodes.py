"""Nodes fail in every way that they do: on a cluster with Kubernetes' own clocks training goes on in seconds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from support.kubernetes.kind_jobs import STEPS, Job, Place

Losses = Callable[[], dict[int, float]]
LONG = {"spec.training.steps": 2 * STEPS}
"""A node is away for longer than the short job lasts."""


def a_job_on_three_nodes(place: Place) -> Job:
    job = place.apply(changes=LONG)
    job.wait_for_workers(3)
    job.wait_for_step(30)
    assert len({worker.node for worker in job.status.workers}) == 3
    return job


def ends_like(job: Job, undisturbed: Losses) -> None:
    """The job comes to its end with every loss as it would have been, as far as the short one went."""
    job.wait_for_phase("Succeeded", timeout=700)
    assert job.losses_match(undisturbed())


def nothing_is_stuck(job: Job, node: str) -> None:
    """No pod of the job is left on the node that is gone, and its replacement runs elsewhere."""
    job.wait_for_workers(3)
    assert node not in {worker.node for worker in job.status.workers}
    assert node not in {pod["spec"].get("nodeName") for pod in job.pods()}


@pytest.mark.core
def test_the_node_of_rank_zero_is_killed(place: Place, undisturbed: Losses) -> None:
    job = a_job_on_three_nodes(place)
    node = job.rank_zero().node

    with ExitStack() as mended:
        with job.fault("node of rank 0 killed"):
            mended.enter_context(place.cluster.node_killed(node))
        nothing_is_stuck(job, node)

    ends_like(job, undisturbed)


def test_a_node_stops_without_a_word(place: Place, undisturbed: Losses) -> None:
    job = a_job_on_three_nodes(place)
    node = next(worker.node for worker in job.status.workers if worker.node != place.cluster.active_operator_node())

    with ExitStack() as mended:
        with job.fault("node paused"):
            mended.enter_context(place.cluster.node_paused(node))
        nothing_is_stuck(job, node)

    ends_like(job, undisturbed)


def test_a_node_stops_without_a_word_and_with_it_the_active_operator(place: Place, undisturbed: Losses) -> None:
    job = a_job_on_three_nodes(place)
    node = place.cluster.active_operator_node()

    with ExitStack() as mended:
        with job.fault("node of the active operator paused") as fault:
            mended.enter_context(place.cluster.node_paused(node))
        nothing_is_stuck(job, node)

    [incident] = fault.incidents
    assert incident.node == node
    assert incident.detected_seconds is not None
    assert incident.detected_seconds > 2  # from the fault on, not from when the other replica took over
    ends_like(job, undisturbed)


def test_a_node_is_cut_off_and_comes_back(place: Place, undisturbed: Losses) -> None:
    job = a_job_on_three_nodes(place)
    node = [worker.node for worker in job.status.workers if worker.node != place.cluster.active_operator_node()][-1]

    with ExitStack() as mended:
        with job.fault("network of a node cut"):
            mended.enter_context(place.cluster.network_cut(node))
        nothing_is_stuck(job, node)

    ends_like(job, undisturbed)


def test_a_drained_node_costs_no_step(place: Place, undisturbed: Losses) -> None:
    job = a_job_on_three_nodes(place)
    node = job.worker(1).node

    with job.fault("node drained") as fault, place.cluster.node_drained(node):
        job.wait_for_workers(3)
        assert node not in {worker.node for worker in job.status.workers}

    assert fault.steps_lost == 0
    ends_like(job, undisturbed)
