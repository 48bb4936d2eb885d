"""Which pods are removed because nobody else would."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pretrain_operator.kubernetes.adapter.janitor import ORPHAN_SECONDS, OVERDUE_SECONDS, removals

NOON = 1_800_000_000.0
OWNER = {"apiVersion": "pretrain.dev/v1alpha1", "kind": "PretrainJob", "name": "gpt2", "uid": "job", "controller": True}


def a_pod(
    *,
    phase: str = "Running",
    age: float = 600.0,
    deadline: float | None = None,
    finalizers: tuple[str, ...] = (),
    owner: dict[str, Any] = OWNER,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"namespace": "team", "name": "gpt2-0", "uid": "pod", "ownerReferences": [owner]}
    metadata |= {"creationTimestamp": at(NOON - age), "finalizers": list(finalizers)}
    metadata |= {} if deadline is None else {"deletionTimestamp": at(NOON + deadline), "deletionGracePeriodSeconds": 30}
    return {"metadata": metadata, "status": {"phase": phase}}


def at(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def verdict(pod: dict[str, Any], at_rest: bool | None = False) -> tuple[str, int | None] | None:
    found = removals([pod], lambda uid: at_rest if uid == "job" else None, NOON)
    return (found[0].why, found[0].grace_seconds) if found else None


def test_a_pod_of_a_job_that_is_served_is_left_alone() -> None:
    assert verdict(a_pod()) is None


def test_a_pod_that_has_time_left_to_end_is_left_alone() -> None:
    assert verdict(a_pod(deadline=10.0)) is None
    assert verdict(a_pod(deadline=-OVERDUE_SECONDS + 1)) is None


def test_a_pod_that_should_have_ended_long_ago_is_removed_by_force() -> None:
    assert verdict(a_pod(deadline=-OVERDUE_SECONDS - 1)) == ("its kubelet does not answer", 0)


@pytest.mark.parametrize("at_rest", [True, None])
def test_what_is_being_deleted_in_time_is_not_deleted_again(at_rest: bool | None) -> None:
    assert verdict(a_pod(deadline=10.0), at_rest) is None


def test_a_pod_whose_job_is_gone_goes_after_a_while() -> None:
    assert verdict(a_pod(age=ORPHAN_SECONDS - 1), None) is None
    assert verdict(a_pod(age=ORPHAN_SECONDS + 1), None) == ("its job is gone", None)


@pytest.mark.parametrize(
    ("phase", "goes"), [("Pending", True), ("Running", True), ("Succeeded", False), ("Failed", False)]
)
def test_of_a_job_that_is_over_only_what_still_runs_is_removed(phase: str, goes: bool) -> None:
    assert (verdict(a_pod(phase=phase), True) is not None) == goes


def test_pods_of_others_and_those_that_others_hold_are_left_alone() -> None:
    assert verdict(a_pod(deadline=-3600.0, owner={**OWNER, "kind": "Job"})) is None
    assert verdict(a_pod(deadline=-3600.0, finalizers=("theirs",))) is None
