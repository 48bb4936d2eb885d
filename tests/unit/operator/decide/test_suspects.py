"""Nodes: what counts against one, and where new workers are put."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain_api.status.job import NodeFailure, Suspect
from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.decide.placement import crashes, next_release, placement, silent_nodes
from pretrain_operator.decide.workers import ObservedWorker
from pretrain_operator.projections.suspects import (
    MAX_FAILURES,
    MAX_SUSPECTS,
    Suspects,
    judged,
    with_failure,
    with_quarantine,
    with_silence,
)
from support.operator.world import NOON, a_job, a_pod, a_view, an_agent, observed

HOUR = 3600.0


def failed(*failures: tuple[str, str, float]) -> Suspects:
    """Of (node, cause, seconds ago)."""
    suspects: Suspects = ()
    for node, cause, ago in failures:
        suspects = with_failure(suspects, node, NodeFailure(time=NOON - ago, cause=cause))
    return suspects


def avoided(suspects: Suspects, **rule: Any) -> set[str]:
    rules = a_job(recovery={"suspects": rule}).spec.recovery.suspects
    return {suspect.node for suspect in judged(suspects, rules, NOON) if suspect.avoided}


def workers(*pods: Pod, heard: tuple[int, ...] = ()) -> tuple[ObservedWorker, ...]:
    """Workers whose agents were all there once; those of the slots `heard` still speak."""
    agents = [an_agent(pod.slot, heard=NOON if pod.slot in heard else NOON - 60) for pod in pods]
    return observed(a_job(), *pods, view=a_view(*agents)).workers


def where(suspects: Suspects, *there: ObservedWorker) -> Placement:
    return placement(suspects, there, 30.0, NOON)


# --- what counts ------------------------------------------------------------------------------------------------------


def test_a_node_is_avoided_after_so_many_failures_within_the_window() -> None:
    assert avoided(failed(("a", "Error", 60))) == set()
    assert avoided(failed(("a", "Error", 60), ("a", "Error", 30))) == {"a"}
    assert avoided(failed(("a", "Error", 60), ("a", "Error", 30)), failures=3) == set()
    assert avoided(failed(("a", "Error", 2 * HOUR), ("a", "Error", 30)), window="1h") == set()


def test_a_crash_that_other_nodes_see_as_often_is_the_programs_own() -> None:
    everywhere = failed(*[(node, "OOMKilled", ago) for node in ("a", "b") for ago in (60, 30)])

    assert avoided(everywhere) == set()
    assert avoided(with_failure(everywhere, "a", NodeFailure(time=NOON, cause="OOMKilled"))) == {"a"}


def test_silence_counts_wherever_else_there_is_silence_too() -> None:
    assert avoided(failed(*[(node, "WorkerSilent", ago) for node in ("a", "b") for ago in (60, 30)])) == {"a", "b"}


def test_a_quarantined_node_is_avoided_at_once_for_the_window() -> None:
    suspects = with_quarantine((), "a", NOON - 2 * HOUR)

    assert avoided(suspects) == {"a"}
    assert avoided(suspects, window="1h") == set()


def test_the_same_failure_counts_once() -> None:
    assert avoided(failed(("a", "Error", 60), ("a", "Error", 60))) == set()


def test_a_node_that_nothing_counts_against_any_more_is_forgotten() -> None:
    suspects = with_silence(failed(("a", "Error", 2 * HOUR)), "b", NOON - 200)

    assert judged(suspects, a_job(recovery={"suspects": {"window": "1h"}}).spec.recovery.suspects, NOON) == ()


def test_judging_again_changes_nothing() -> None:
    rule = a_job().spec.recovery.suspects
    once = judged(with_silence(failed(("a", "Error", 60), ("b", "Error", 30)), "c", NOON - 5), rule, NOON)

    assert judged(once, rule, NOON + 60) == once


def test_what_is_kept_is_bounded_and_the_newest() -> None:
    suspects: Suspects = ()
    for count in range(MAX_SUSPECTS + 5):
        for second in range(MAX_FAILURES + 5):
            suspects = with_failure(suspects, f"n{count}", NodeFailure(time=NOON + second, cause="Error"))

    assert len(suspects) == MAX_SUSPECTS
    assert suspects[-1].node == f"n{MAX_SUSPECTS + 4}"
    assert [failure.time - NOON for failure in suspects[-1].failures] == list(range(5, MAX_FAILURES + 5))


def test_a_worker_without_a_known_node_leaves_no_suspect() -> None:
    assert with_silence((), "", NOON) == ()


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"reason": "OOMKilled", "exit_code": 137}, True),
        ({"reason": "Error", "exit_code": 137}, True),
        ({"reason": "Error", "exit_code": 1}, True),
        ({"reason": "Error", "exit_code": 2}, False),
        ({"reason": "Error", "exit_code": 143}, False),
        ({"reason": "Error", "exit_code": 1, "deleting": True}, False),
        ({"reason": "Evicted"}, False),
        ({"reason": "Preempted"}, False),
        ({"reason": "Completed", "exit_code": 0, "phase": "Succeeded"}, False),
        ({"phase": "Running"}, False),
    ],
    ids=str,
)
def test_only_crashes_and_memory_count_and_no_end_on_purpose(fields: dict[str, Any], counts: bool) -> None:
    pod = a_pod(1, finished_at=NOON, **{"phase": "Failed"} | fields)

    expected = [("node-1", NodeFailure(time=NOON, cause=pod.reason))] if counts else []
    assert list(crashes([pod])) == expected


# --- where workers go -------------------------------------------------------------------------------------------------


def test_avoided_nodes_are_taken_where_no_others_will_do() -> None:
    suspects = (Suspect(node="a", avoided=True), Suspect(node="b"))

    assert where(suspects, *workers(a_pod(0))) == Placement(frozenset(), frozenset({"a"}), 30.0)


def test_a_silent_node_is_excluded_for_two_minutes() -> None:
    others = workers(a_pod(0), heard=(0,))

    assert where(with_silence((), "a", NOON - 119), *others).never == {"a"}
    assert where(with_silence((), "a", NOON - 121), *others).never == frozenset()
    assert next_release(with_silence((), "a", NOON - 119), NOON) == 1.0
    assert next_release(with_silence((), "a", NOON - 121), NOON) is None


def test_silence_said_again_and_again_counts_from_the_first_time() -> None:
    first = with_silence((), "a", NOON - 60)

    assert with_silence(first, "a", NOON) == first
    assert with_silence(first, "a", NOON + 90)[0].silent_at == NOON + 90


def test_a_node_from_which_somebody_speaks_is_not_excluded() -> None:
    there = workers(a_pod(0, node="a"), a_pod(1, node="a"), a_pod(2, node="b"), heard=(1, 2))

    assert where(with_silence((), "a", NOON), *there).never == frozenset()
    assert silent_nodes(there[:1], there) == frozenset()
    assert silent_nodes(there[:1], there[:1]) == {"a"}


def test_a_node_that_the_cluster_calls_not_ready_is_excluded_while_it_does() -> None:
    there = workers(a_pod(0, node_ready=False), a_pod(1, node_ready=True), a_pod(2, node_ready=None))

    assert where((), *there).never == {"node-0"}


def test_the_only_node_known_is_never_excluded() -> None:
    alone = workers(a_pod(0, node_ready=False))

    assert where(with_silence((), "node-0", NOON), *alone) == Placement(frozenset(), frozenset({"node-0"}), 30.0)


def test_nodes_are_not_excluded_all_at_once() -> None:
    there = workers(*[a_pod(slot, node_ready=False) for slot in range(3)])

    assert where((), *there) == Placement(frozenset(), frozenset({"node-0", "node-1", "node-2"}), 30.0)


def test_without_any_pod_on_a_node_nothing_is_excluded() -> None:
    assert where((), *workers(a_pod(0, phase="Pending", node=""))) == Placement()
