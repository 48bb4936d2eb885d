"""Workers are lost, added and taken away: training goes on, with the losses of a run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from support.kubernetes.kind import Refused, wait_until
from support.kubernetes.kind_jobs import STEPS, Job, Place

Losses = Callable[[], dict[int, float]]


def ends_like(job: Job, undisturbed: Losses) -> None:
    """The job comes to its end with every loss as it would have been."""
    status = job.wait_for_phase("Succeeded", timeout=700)
    assert status.step == STEPS
    assert job.losses_match(undisturbed())


@pytest.mark.core
def test_a_deleted_pod_costs_no_step_and_is_replaced(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with job.fault("pod deleted") as fault:
        deleted = job.delete_worker(1)
    job.wait_for_workers(3)

    assert fault.steps_lost == 0
    assert deleted not in {pod["metadata"]["name"] for pod in job.pods()}
    assert job.worker(1).attempt == 1
    ends_like(job, undisturbed)


@pytest.mark.parametrize("slot", [0, 2])
def test_a_pod_deleted_by_force_costs_at_most_the_checkpoint_interval(
    place: Place, undisturbed: Losses, slot: int
) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with job.fault(f"pod of slot {slot} deleted by force") as fault:
        job.delete_worker(slot, force=True)

    assert fault.steps_lost <= 2 * 20
    ends_like(job, undisturbed)


def test_a_training_process_killed_starts_again_in_its_pod(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)
    pods = {pod["metadata"]["uid"] for pod in job.pods()}

    with job.fault("training process killed") as fault:
        job.kill_rank(1)

    assert [incident.cause for incident in fault.incidents] == ["RankFailed"]
    assert {pod["metadata"]["uid"] for pod in job.pods()} == pods
    ends_like(job, undisturbed)


def test_an_agent_killed_takes_its_ranks_with_it_and_is_replaced(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with job.fault("agent killed"):
        job.kill_agent(0)
    job.wait_for_workers(3)

    assert job.worker(0).attempt == 1
    ends_like(job, undisturbed)


def test_a_worker_killed_for_its_memory_is_replaced_and_the_reason_is_told(place: Place, undisturbed: Losses) -> None:
    template = {"containers": [limited_worker(place, "900Mi")], "volumes": [MEMORY]}
    job = place.apply(changes={"spec.workers.template.spec": template})
    job.wait_for_workers(3)
    job.wait_for_step(30)

    with job.fault("worker out of memory") as fault:
        fill = "full = open('/memory/full', 'wb')\nwhile True: full.write(bytes(1 << 20))"
        with suppress(Refused):  # it ends with the container
            place.cluster.kubectl("exec", "-n", place.name, job.pod(2), "--", "python3", "-c", fill)
    job.wait_for_workers(3)

    assert "OOMKilled" in " ".join(incident.message for incident in fault.incidents) + job.describe()
    ends_like(job, undisturbed)


MEMORY = {"name": "memory", "emptyDir": {"medium": "Memory"}}
"""What is written there counts as the pod's memory and goes with no process: the kernel kills one after the other."""


def limited_worker(place: Place, memory: str) -> dict[str, object]:
    return {
        "name": "worker",
        "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
        "env": [{"name": "AWS_ENDPOINT_URL", "value": place.cluster.s3_endpoint}],
        "resources": {"requests": {"cpu": "50m", "memory": "300Mi"}, "limits": {"memory": memory}},
    }


@pytest.mark.core
def test_scaling_to_five_and_to_two_costs_no_step(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(15)

    for replicas in (5, 2):
        with job.fault(f"scaled to {replicas}") as fault:
            job.scale(replicas)
        job.wait_for_workers(replicas)
        assert fault.steps_lost == 0

    assert job.status.incidents == ()
    ends_like(job, undisturbed)


def test_suspended_and_resumed_it_goes_on_from_where_it_was(place: Place, undisturbed: Losses) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(30)

    job.patch({"suspend": True})
    suspended = job.wait_for_phase("Suspended")
    wait_until(lambda: all(pod["status"]["phase"] != "Running" for pod in job.pods()), "all workers are let go")
    job.patch({"suspend": False})
    job.wait_for_phase("Training")

    assert job.status.incidents == ()
    assert job.status.checkpoints.latest_step is not None
    assert suspended.step >= 30
    ends_like(job, undisturbed)


def test_two_jobs_do_not_touch_each_other(place: Place, undisturbed: Losses) -> None:
    first = place.apply("first", {"spec.workers.replicas": 2})
    second = place.apply("second", {"spec.workers.replicas": 2})
    for job in (first, second):
        job.wait_for_workers(2)
        job.wait_for_step(20)

    with first.fault("pod of the other job deleted by force"):
        first.delete_worker(0, force=True)

    ends_like(first, undisturbed)
    second.wait_for_phase("Succeeded", timeout=700)
    assert second.status.incidents == ()
    assert [generation.number for generation in second.status.generations] == [1]


@pytest.mark.core
def test_a_deleted_job_leaves_nothing_but_its_checkpoints(place: Place) -> None:
    job = place.apply()
    job.wait_for_workers(3)
    job.wait_for_step(25)

    job.delete()

    place.wait_until_empty()
    assert place.checkpoints(job) != []
