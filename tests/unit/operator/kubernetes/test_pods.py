"""What is known of a worker from its pod, as the API server sends it."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain_operator.cluster import Placement
from pretrain_operator.kubernetes.workload import manifests
from pretrain_operator.kubernetes.workload.names import index_by_job, worker_pod
from pretrain_operator.kubernetes.workload.pods import pod_of
from support.kubernetes.jobs import SETTINGS, UID, a_parsed_job

Object = dict[str, Any]
BORN, DIED = "2027-01-15T08:00:00Z", "2027-01-15T08:00:30Z"
BORN_SECONDS = 1_800_000_000.0


def a_pod(status: Object, *, node: str = "node-1", deleting: bool = False, slot: int = 2, attempt: int = 5) -> Object:
    """As the API server keeps what we made."""
    pod = manifests.pod(a_parsed_job(), slot, attempt, Placement(), SETTINGS)
    pod["metadata"] |= {"uid": "pod-1", "creationTimestamp": BORN}
    if deleting:
        pod["metadata"]["deletionTimestamp"] = DIED
    pod["spec"]["nodeName"] = node
    return pod | {"status": status}


def a_container(kind: str, name: str = "worker", **state: Any) -> Object:
    return {"name": name, "state": {kind: state}}


def a_condition(kind: str, status: str = "True", **fields: str) -> Object:
    return {"type": kind, "status": status, "lastTransitionTime": DIED, **fields}


def ended(exit_code: int, reason: str = "Error", **fields: Any) -> Object:
    return a_container("terminated", exitCode=exit_code, reason=reason, finishedAt=DIED, **fields)


def failed(*containers: Object, **status: Any) -> Object:
    return {"phase": "Failed", "containerStatuses": list(containers), **status}


def test_a_running_worker_is_known_by_its_labels() -> None:
    status = {"phase": "Running", "containerStatuses": [a_container("running", startedAt=BORN)]}

    pod = pod_of(a_pod(status), None)

    assert (pod.slot, pod.attempt, pod.phase, pod.node, pod.created_at) == (2, 5, "Running", "node-1", BORN_SECONDS)
    assert (pod.deleting, pod.finished_at, pod.exit_code, pod.reason, pod.message) == (False, None, None, "", "")


def test_a_pod_that_nobody_has_looked_at_is_pending() -> None:
    pod = a_pod({})
    del pod["spec"]["nodeName"], pod["status"]

    assert (pod_of(pod, None).phase, pod_of(pod, None).node) == ("Pending", "")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (failed(ended(1)), "Error"),
        (failed(ended(137, "OOMKilled")), "OOMKilled"),
        (failed(ended(128, "StartError")), "StartError"),
        (failed(reason="Evicted", message="low on memory"), "Evicted"),
        (failed(ended(137), reason="Evicted"), "Evicted"),
        (failed(ended(137, "OOMKilled"), reason="Evicted"), "OOMKilled"),
        (failed(reason="NodeLost"), "NodeLost"),
        (failed(reason="UnexpectedAdmissionError"), "UnexpectedAdmissionError"),
        (failed(ended(143), conditions=[a_condition("DisruptionTarget", reason="PreemptionByScheduler")]), "Preempted"),
        (failed(conditions=[a_condition("DisruptionTarget", reason="DeletionByTaintManager")]), "NodeLost"),
        (failed(conditions=[a_condition("DisruptionTarget", reason="DeletionByPodGC")]), "NodeLost"),
        (failed(ended(143), conditions=[a_condition("DisruptionTarget", reason="EvictionByEvictionAPI")]), "Evicted"),
        (failed(ended(1), conditions=[a_condition("DisruptionTarget", "False")]), "Error"),
        (failed(), "Error"),
        ({"phase": "Succeeded", "containerStatuses": [ended(0, "Completed")]}, "Completed"),
        ({"phase": "Succeeded"}, "Completed"),
    ],
)
def test_an_ended_worker_says_why(status: Object, reason: str) -> None:
    assert pod_of(a_pod(status), None).reason == reason


def test_a_failed_worker_says_when_and_with_what() -> None:
    pod = pod_of(a_pod(failed(ended(71, message="the last words"))), None)

    assert (pod.phase, pod.exit_code, pod.message) == ("Failed", 71, "the last words")
    assert pod.finished_at == BORN_SECONDS + 30


def test_a_worker_whose_containers_nobody_could_ask_ended_when_it_was_given_up() -> None:
    lost = failed(conditions=[a_condition("DisruptionTarget", reason="DeletionByTaintManager", message="node is dead")])

    pod = pod_of(a_pod(lost), None)

    assert (pod.finished_at, pod.exit_code, pod.message) == (BORN_SECONDS + 30, None, "node is dead")


@pytest.mark.parametrize(("exit_code", "phase"), [(0, "Succeeded"), (1, "Failed")])
def test_a_worker_has_ended_though_another_container_goes_on(exit_code: int, phase: str) -> None:
    others = [a_container("running", "side"), ended(exit_code)]

    assert pod_of(a_pod({"phase": "Running", "containerStatuses": others}), None).phase == phase


def test_a_worker_that_ended_well_did_so_though_another_container_failed() -> None:
    assert pod_of(a_pod(failed(ended(0, "Completed"))), None).phase == "Succeeded"


def test_a_worker_runs_though_another_container_cannot_start() -> None:
    statuses = [a_container("waiting", "side", reason="ImagePullBackOff"), a_container("running")]

    pod = pod_of(a_pod({"phase": "Pending", "containerStatuses": statuses}), None)

    assert (pod.phase, pod.reason) == ("Running", "")


def test_a_worker_on_a_lost_node_may_still_run() -> None:
    assert pod_of(a_pod({"phase": "Unknown"}), None).phase == "Running"


@pytest.mark.parametrize(
    "reason",
    ["ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError",
     "RunContainerError"],
)  # fmt: skip
def test_a_pending_worker_says_what_it_waits_for(reason: str) -> None:
    waiting = a_container("waiting", reason=reason, message='secret "s3-credentials" not found')

    pod = pod_of(a_pod({"phase": "Pending", "containerStatuses": [waiting]}), None)

    assert (pod.phase, pod.reason, pod.message) == ("Pending", reason, 'secret "s3-credentials" not found')


def test_an_unschedulable_worker_says_it_in_the_schedulers_words() -> None:
    unschedulable = a_condition("PodScheduled", "False", reason="Unschedulable", message="0/3 nodes are available")

    pod = pod_of(a_pod({"phase": "Pending", "conditions": [unschedulable]}, node=""), None)

    assert (pod.reason, pod.message) == ("Unschedulable", "0/3 nodes are available")


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing"])
def test_a_worker_on_its_way_waits_for_nothing(reason: str) -> None:
    status = {
        "phase": "Pending",
        "conditions": [a_condition("PodScheduled")],
        "containerStatuses": [a_container("waiting", reason=reason)],
    }

    assert pod_of(a_pod(status), None).reason == ""


def test_an_init_container_that_cannot_start_is_what_it_waits_for() -> None:
    status = {
        "phase": "Pending",
        "initContainerStatuses": [a_container("waiting", "fetch", reason="ErrImagePull", message="no such image")],
        "containerStatuses": [a_container("waiting", reason="PodInitializing")],
    }

    assert pod_of(a_pod(status), None).message == "no such image"


def test_a_worker_that_is_being_preempted_says_so_while_it_runs() -> None:
    status = {"phase": "Running", "conditions": [a_condition("DisruptionTarget", reason="PreemptionByScheduler")]}

    leaving, staying = pod_of(a_pod(status, deleting=True), None), pod_of(a_pod(status), None)

    assert (leaving.deleting, leaving.reason) == (True, "Preempted")
    assert (staying.deleting, staying.reason) == (False, "")


@pytest.mark.parametrize(("ready", "known"), [("True", True), ("False", False), ("Unknown", False)])
def test_a_node_is_ready_or_not(ready: str, known: bool) -> None:
    node = {"metadata": {"name": "node-1"}, "status": {"conditions": [a_condition("Ready", ready)]}}

    assert pod_of(a_pod({"phase": "Running"}), node).node_ready is known


def test_a_node_that_has_not_said_anything_is_not_ready() -> None:
    assert pod_of(a_pod({"phase": "Running"}), {"metadata": {"name": "node-1"}}).node_ready is False


def test_without_its_node_nothing_is_known_of_it() -> None:
    assert pod_of(a_pod({"phase": "Running"}), None).node_ready is None


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {}},
        {"labels": None},
        {"ownerReferences": []},
        {"labels": {"pretrain.dev/job-uid": "another", "pretrain.dev/slot": "1", "pretrain.dev/attempt": "0"}},
        {"labels": {"pretrain.dev/job-uid": UID, "pretrain.dev/slot": "one", "pretrain.dev/attempt": "0"}},
        {"labels": {"pretrain.dev/job-uid": UID, "pretrain.dev/slot": "1", "pretrain.dev/attempt": "-1"}},
        {"ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "uid": UID, "controller": True}]},
    ],
)
def test_a_pod_that_only_looks_like_a_worker_is_none(change: Object) -> None:
    pod = a_pod({"phase": "Running"})
    assert index_by_job(pod) == (UID,)

    pod["metadata"] |= change

    assert worker_pod(pod) is None
    assert index_by_job(pod) == ()
