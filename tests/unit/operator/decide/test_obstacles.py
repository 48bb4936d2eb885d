"""Obstacles: reported by one reconcile, once, with a remedy, and gone when resolved."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Condition, JobStatus, Obstacle
from pretrain_operator.cluster import Event, Pod
from pretrain_operator.decide.conditions import condition_of
from pretrain_operator.decide.lifecycle import lifecycle
from pretrain_operator.decide.observe import Observed, PodRefusal
from pretrain_operator.decide.obstacles import obstacles
from pretrain_operator.decide.status import compose, status_events
from support.operator.world import NOON, a_generation, a_job, a_pod, a_stuck_pod, a_view, an_agent, observed

NO_BUCKET = Obstacle(reason="BucketMissing", message="bucket runs does not exist; create it")
QUOTA = PodRefusal("QuotaExceeded", "worker 1 cannot be created: exceeded quota; raise the quota")


def said(job: PretrainJob, seen: Observed) -> JobStatus:
    return compose(job, JobStatus(), lifecycle(job, seen, NOON), seen, NOON)


def blocked(status: JobStatus) -> Condition:
    condition = condition_of(status.conditions, "Blocked")
    assert condition is not None
    return condition


def training(*slots: int, **fields: Any) -> dict[str, Any]:
    agents = [an_agent(slot) for slot in slots]
    return {"view": a_view(*agents, current=a_generation(1, *[(slot, 0) for slot in slots])), "state": "training"}


@pytest.mark.parametrize(
    ("pod", "reason", "remedy"),
    [
        (a_stuck_pod(0, "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."), "", "add or free"),
        (a_stuck_pod(0, "ImagePullBackOff", "back-off"), "", "spec.workers.image"),
        (a_stuck_pod(0, "ErrImagePull", "not found"), "ImagePullBackOff", "spec.workers.image"),
        (a_stuck_pod(0, "InvalidImageName", "bad name"), "", "spec.workers.image"),
        (a_stuck_pod(0, "CreateContainerConfigError", 'secret "s3" not found'), "", "create the secret"),
        (a_stuck_pod(0, "CreateContainerError", "no such device"), "", "spec.workers.template"),
        (a_stuck_pod(0, "RunContainerError", "exec: not found"), "", "spec.workers.template"),
        (a_stuck_pod(0, "SomethingNew", "who knows"), "", "kubectl describe pod"),
    ],
    ids=lambda value: value.reason if isinstance(value, Pod) else "",
)
def test_a_pod_that_cannot_start_blocks_a_job_that_needs_it(pod: Pod, reason: str, remedy: str) -> None:
    status = said(a_job(1), observed(a_job(1), pod))

    assert (status.phase, status.reason) == ("Pending", reason or pod.reason)
    assert status.message == blocked(status).message
    assert (blocked(status).status, blocked(status).reason) == ("True", reason or pod.reason)
    assert "worker 0" in status.message
    assert pod.message.rstrip(".") in status.message
    assert remedy in status.message


def test_a_refused_pod_blocks_a_job_that_needs_it() -> None:
    job = a_job(2, minimum=2)

    status = said(job, observed(job, a_pod(0), view=a_view(an_agent(0)), refusal=QUOTA))

    assert (status.phase, status.reason) == ("Pending", "QuotaExceeded")
    assert status.message == QUOTA.message
    assert status.bookkeeping.refused == Obstacle(reason="QuotaExceeded", message=QUOTA.message)


def test_a_refusal_is_over_when_every_slot_has_its_pod() -> None:
    job = a_job(2)

    status = said(job, observed(job, a_pod(0), a_pod(1), refusal=QUOTA, **training(0, 1)))

    assert condition_of(status.conditions, "Blocked") is None
    assert status.bookkeeping.refused is None


def test_ranks_that_wait_are_not_training_whatever_state_they_are_in() -> None:
    job = a_job(2)
    for state, phase in (("restoring", "Pending"), ("recovering", "Recovering")):
        fields = training(0, 1) | {"state": state}

        status = said(job, observed(job, a_pod(0), a_pod(1), ranks_wait=NO_BUCKET, **fields))

        assert (status.phase, status.reason, status.message) == (phase, "BucketMissing", NO_BUCKET.message)


def test_during_a_recovery_the_phase_stays_recovering() -> None:
    job = a_job(2, minimum=2)
    view = a_view(an_agent(0))

    status = said(job, observed(job, a_pod(0), a_stuck_pod(1), view=view, state="recovering", recovering="WorkerLost"))

    assert (status.phase, status.reason) == ("Recovering", "Unschedulable")


def test_where_the_rest_trains_on_the_job_is_degraded_and_blocked() -> None:
    job = a_job(3)

    status = said(job, observed(job, a_pod(0), a_pod(1), a_stuck_pod(2), **training(0, 1)))

    assert (status.phase, status.reason) == ("Training", "Training")
    assert blocked(status).status == "True"
    degraded = condition_of(status.conditions, "Degraded")
    assert degraded is not None
    assert degraded.status == "True"


def test_enough_workers_that_are_on_their_way_are_not_blocked_by_the_others() -> None:
    job = a_job(3, minimum=2)

    status = said(job, observed(job, a_pod(0), a_pod(1), a_stuck_pod(2), state="starting"))

    assert (status.phase, status.reason) == ("Starting", "WorkersJoining")
    assert blocked(status).status == "True"


def test_an_invalid_spec_is_reported_and_the_job_continues() -> None:
    job = a_job(2)
    wrong = "spec.workers.replicas: must be at least 1"

    status = said(job, observed(job, a_pod(0), a_pod(1), invalid=wrong, **training(0, 1)))
    starting = said(job, observed(job, a_pod(0), a_pod(1), invalid=wrong, state="starting"))

    assert (status.phase, blocked(status).reason) == ("Training", "InvalidSpec")
    assert wrong in blocked(status).message
    assert "continues with the last valid spec" in blocked(status).message
    assert starting.phase == "Starting"


def test_of_several_obstacles_all_are_told_the_most_pressing_first() -> None:
    job = a_job(3)
    seen = observed(job, a_stuck_pod(0), a_stuck_pod(1, "ErrImagePull"), refusal=QUOTA, invalid="x")

    status = said(job, seen)

    assert [item.reason for item in obstacles(job, seen)] == [
        "QuotaExceeded",
        "Unschedulable",
        "ImagePullBackOff",
        "InvalidSpec",
    ]
    assert blocked(status).reason == "QuotaExceeded"
    for word in ("quota", "Unschedulable", "spec.workers.image", "InvalidSpec"):
        assert word in blocked(status).message


def test_many_workers_are_counted_and_what_the_cluster_says_is_shortened() -> None:
    job = a_job(8)
    message = "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available: " + "x" * 2000

    (obstacle,) = obstacles(job, observed(job, *[a_stuck_pod(slot, message=message) for slot in range(8)]))

    assert obstacle.message.startswith("workers 0, 1, 2, 3, 4 and 3 more: 0/3 nodes are available: 3 Insufficient cpu;")
    assert len(obstacles(job, observed(job, a_stuck_pod(0, message="y" * 5000)))[0].message) < 800


def test_nothing_is_in_the_way_of_a_job_that_wants_no_workers_but_a_mistake_in_its_spec() -> None:
    job = a_job(1, suspend=True)

    calm = said(job, observed(job, a_stuck_pod(0), refusal=QUOTA))
    wrong = said(job, observed(job, invalid="spec.workers: wrong"))

    assert condition_of(calm.conditions, "Blocked") is None
    assert (wrong.phase, blocked(wrong).reason) == ("Suspended", "InvalidSpec")


def test_pods_of_slots_that_are_no_longer_wanted_are_no_obstacle() -> None:
    job = a_job(1)

    assert obstacles(job, observed(job, a_pod(0), a_stuck_pod(1))) == ()


# --- events -----------------------------------------------------------------------------------------------------------


def test_one_event_reports_the_obstacle_and_one_its_end() -> None:
    job = a_job(1)
    calm = said(job, observed(job, a_pod(0, phase="Pending")))
    stuck = said(job, observed(job, a_stuck_pod(0, "ErrImagePull", "not found")))
    still = said(job, observed(job, a_stuck_pod(0, "ImagePullBackOff", "back-off"), written=stuck))
    mended = said(job, observed(job, a_pod(0), state="starting", written=still))

    assert status_events(calm, stuck) == (Event("Warning", "ImagePullBackOff", stuck.message),)
    assert status_events(stuck, still) == ()
    assert [(event.type, event.reason) for event in status_events(still, mended)] == [
        ("Normal", "Unblocked"),
        ("Normal", "WorkersJoining"),
    ]


def test_the_condition_keeps_the_time_since_which_the_job_is_blocked() -> None:
    job = a_job(1)
    first = said(job, observed(job, a_stuck_pod(0)))
    seen = observed(job, a_stuck_pod(0, "ErrImagePull"), written=first)

    later = compose(job, JobStatus(), lifecycle(job, seen, NOON), seen, NOON + 60)

    assert blocked(later).last_transition_time == blocked(first).last_transition_time


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("Training", "Training"), ("Recovering", "WorkerLost")),
        (("Recovering", "WorkerLost"), ("Training", "Training")),
        (("Training", "Training"), ("Holding", "Resizing")),
        (("Holding", "Resizing"), ("Training", "Training")),
    ],
    ids=str,
)
def test_phases_that_other_events_tell_of_are_not_told_again(before: Any, after: Any) -> None:
    def status(phase: str, reason: str) -> JobStatus:
        return JobStatus.model_validate({"phase": phase, "reason": reason})

    assert status_events(status(*before), status(*after)) == ()
    assert status_events(status("Starting", "RanksStarting"), status("Training", "Training")) != ()
