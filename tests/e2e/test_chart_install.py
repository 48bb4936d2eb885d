"""The chart on a real cluster: install, its own test, upgrade, uninstall; and a job that trains to its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from support.kubernetes.kind import CHART, RELEASE, SYSTEM, Cluster, wait_until
from support.kubernetes.kind_jobs import STEPS, Place

LONG = 3 * STEPS
"""So that the operator is back before the end."""
MODES = {
    "cluster-wide": (),
    "namespaced": ("--set", "watchNamespace=default"),
    "no extras": ("--set", "networkPolicy.enabled=false,podDisruptionBudget.enabled=false,metrics.service=false"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_api_server_takes_every_object_of_the_chart(cluster: Cluster, mode: str) -> None:
    rendered = cluster.helm("template", "other", str(CHART), "--set", "crds.install=false", *MODES[mode])

    applied = cluster.run("kubectl", "apply", "--dry-run=server", "-f", "-", given=rendered)

    assert "deployment.apps/other-pretrain-operator" in applied


@pytest.mark.core
def test_both_replicas_are_ready_on_different_nodes_and_one_is_active(operator: Cluster) -> None:
    pods = operator.items("pods", "-n", SYSTEM, "-l", f"app.kubernetes.io/instance={RELEASE}")
    running = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    assert len({pod["spec"]["nodeName"] for pod in running}) == 2
    assert operator.active_operator() in {pod["metadata"]["name"] for pod in running}


def test_the_charts_own_test_passes(operator: Cluster) -> None:
    def reached() -> bool:
        ready = operator.kubectl("get", "endpoints", f"{RELEASE}-agents", "-n", SYSTEM, "-o", "json")
        return bool(json.loads(ready).get("subsets"))

    wait_until(reached, "the agents' Service leads to the active replica")

    assert "Succeeded" in operator.helm("test", RELEASE, "-n", SYSTEM)


@pytest.mark.core
def test_a_job_of_three_workers_on_three_nodes_trains_to_its_end(
    place: Place, undisturbed: Callable[[], dict[int, float]]
) -> None:
    job = place.apply()

    job.wait_for_workers(3)
    nodes = {worker.node for worker in job.status.workers}
    status = job.wait_for_phase("Succeeded", timeout=700)

    assert len(nodes) == 3
    assert status.step == STEPS
    assert status.checkpoints.latest_step == STEPS
    assert status.incidents == ()
    assert job.losses_match(undisturbed())


def test_an_upgrade_keeps_the_certificate_and_disturbs_no_job(operator: Cluster, place: Place) -> None:
    def certificate() -> str:
        return operator.get("secret", f"{RELEASE}-tls", "-n", SYSTEM)["data"]["tls.crt"]

    job = place.apply(changes={"spec.training.steps": LONG})
    before = certificate()
    job.wait_for_step(20)

    operator.install("--set", f"podAnnotations.upgraded=t{os.urandom(3).hex()}")

    assert certificate() == before
    status = job.wait_for_phase("Succeeded", timeout=700)
    assert [summary.number for summary in status.generations] == [1]
    assert status.incidents == ()


def test_an_operator_of_one_namespace_trains_its_jobs_without_a_right_elsewhere(
    operator: Cluster, place: Place, undisturbed: Callable[[], dict[int, float]]
) -> None:
    alone = undisturbed()
    operator.install("--set", f"watchNamespace={place.name}")
    try:
        everywhere = operator.kubectl("get", "clusterroles,clusterrolebindings", "-o", "name").split()
        job = place.apply()
        job.wait_for_workers(3)
        job.wait_for_step(30)
        with job.fault("pod deleted by force, operator of one namespace"):
            job.delete_worker(1, force=True)
        job.wait_for_workers(3)
        job.wait_for_phase("Succeeded", timeout=700)
    finally:
        operator.install()

    assert [name for name in everywhere if RELEASE in name] == []
    assert job.losses_match(alone)


def test_uninstalling_leaves_jobs_training_and_installing_again_takes_them_over(
    operator: Cluster, place: Place
) -> None:
    job = place.apply(changes={"spec.training.steps": LONG})
    job.wait_for_step(20)

    operator.helm("uninstall", RELEASE, "-n", SYSTEM, "--wait")
    try:
        assert operator.kubectl("get", "crd", "pretrainjobs.pretrain.dev", "-o", "name")
        assert [pod["status"]["phase"] for pod in job.pods()] == ["Running"] * 3
    finally:
        operator.install()

    status = job.wait_for_phase("Succeeded", timeout=700)
    assert [summary.number for summary in status.generations] == [1]
