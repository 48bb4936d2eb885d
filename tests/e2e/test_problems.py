"""What only the cluster can know to be wrong is in the status within seconds, with the remedy; mended, it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from support.kubernetes.kind import Refused
from support.kubernetes.kind_jobs import Place

WITHIN = 20.0
"""Seconds: ten of them are promised from the first agent's start; a pod has to be scheduled first."""


def test_an_image_that_is_nowhere_is_told_and_mended(place: Place) -> None:
    job = place.apply(changes={"spec.workers.image": "nowhere.invalid/trainer:1"})

    message = job.wait_for_condition("Blocked", "ImagePullBackOff", timeout=60)
    job.patch({"workers": {"image": "pretrain-trainer:0.1.0"}})

    assert "nowhere.invalid/trainer:1" in message
    job.wait_for_phase("Training")


def test_a_missing_secret_is_told_and_mended(place: Place) -> None:
    changes = {"spec.checkpoint.storage.s3.credentialsSecret": "not-there"}
    job = place.apply(changes=changes)

    message = job.wait_for_condition("Blocked", "CreateContainerConfigError", timeout=WITHIN)
    place.secret("not-there")

    assert "not-there" in message
    job.wait_for_phase("Training")


def test_a_bucket_that_is_missing_is_told(place: Place) -> None:
    job = place.apply(changes={"spec.checkpoint.storage.s3.bucket": "not-there-at-all"})

    assert "not-there-at-all" in job.wait_for_condition("Blocked", "BucketMissing", timeout=60)
    assert job.status.incidents == ()


def test_a_resource_that_no_node_has_is_told(place: Place) -> None:
    worker: dict[str, Any] = {
        "name": "worker",
        "env": [{"name": "AWS_ENDPOINT_URL", "value": place.cluster.s3_endpoint}],
        "resources": {"limits": {"example.com/gpu": 8}},
    }
    job = place.apply(changes={"spec.workers.template.spec.containers": [worker]})

    assert "example.com/gpu" in job.wait_for_condition("Blocked", "Unschedulable", timeout=WITHIN)


def test_a_quota_lets_those_train_for_whom_there_is_room(place: Place) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "two-pods"},
        "spec": {"hard": {"pods": "2"}},
    }
    place.cluster.kubectl("create", "-n", place.name, "-f", "-", given=quota)
    job = place.apply()

    assert "two-pods" in job.wait_for_condition("Blocked", "QuotaExceeded", timeout=WITHIN)
    job.wait_for_workers(2)
    place.cluster.kubectl("delete", "resourcequota", "two-pods", "-n", place.name)

    job.wait_for_workers(3)
    assert job.status.incidents == ()


def test_the_api_server_refuses_what_cannot_be_right(place: Place) -> None:
    with pytest.raises(Refused, match="min is greater than max"):
        place.apply(changes={"spec.workers.elastic": {"min": 3, "max": 2}})
