"""Replacement of workers whose pods still exist: dead nodes, silence, failed starts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Bookkeeping, Condition, JobStatus, NodeFailure, Obstacle, SlotMemory, Suspect
from pretrain_operator.cluster import Pod
from pretrain_operator.decide.actions import CreatePod, DeleteJob, DeletePod
from pretrain_operator.decide.observe import Observed, PodRefusal
from pretrain_operator.decide.plan import Decision, plan
from support.operator.world import NOON, a_generation, a_job, a_pod, a_stuck_pod, a_view, an_agent, observed

NEVER_JOINED = JobStatus(bookkeeping=Bookkeeping(slots=(SlotMemory(slot=0, attempt=0),)))


def decide(job: PretrainJob, *pods: Pod, **fields: Any) -> Decision:
    seen = observed(job, *pods, **fields)
    assert plan(job, seen, NOON) == plan(job, seen, NOON), "the same input gives the same decision"
    return plan(job, seen, NOON)


def acts(decision: Decision) -> list[tuple[str, int, int]]:
    """(what, slot, attempt)"""
    found: list[tuple[str, int, int]] = []
    for action in decision.actions:
        match action:
            case CreatePod(slot, attempt):
                found.append(("create", slot, attempt))
            case DeletePod(pod, grace):
                found.append(("kill" if grace == 0 else "end", pod.slot, pod.attempt))
            case _:
                found.append((type(action).__name__, -1, -1))
    return found


def reformed(silent_for: float) -> dict[str, Any]:
    """Worker 0 trains alone; worker 1 was last heard this number of seconds ago."""
    agents = (an_agent(0), an_agent(1, heard=NOON - silent_for))
    return {"view": a_view(*agents, current=a_generation(2, (0, 0))), "state": "training"}


REPLACED = [("kill", 1, 0), ("create", 1, 1)]


# --- dead nodes -------------------------------------------------------------------------------------------------------


def test_a_worker_on_a_node_that_is_not_ready_is_replaced_as_soon_as_the_others_resume_without_it() -> None:
    decision = decide(a_job(2), a_pod(0), a_pod(1, node_ready=False), **reformed(silent_for=2.5))

    assert acts(decision) == REPLACED
    assert decision.actions[1].placement.never == {"node-1"}  # type: ignore[union-attr]


def test_a_pod_that_its_dead_node_cannot_end_is_removed_by_force() -> None:
    decision = decide(a_job(2), a_pod(0), a_pod(1, deleting=True, node_ready=False), **reformed(silent_for=2.5))

    assert acts(decision) == REPLACED


def test_a_worker_that_speaks_is_left_alone_whatever_the_cluster_says_of_its_node() -> None:
    agents = (an_agent(0), an_agent(1))
    view = a_view(*agents, current=a_generation(1, (0, 0), (1, 0)))

    decision = decide(a_job(2), a_pod(0), a_pod(1, node_ready=False), view=view)

    assert decision.actions == ()
    assert decision.requeue_after == 10.0


def test_a_pod_that_never_started_on_a_dead_node_is_replaced() -> None:
    bound = a_pod(0, phase="Pending", node_ready=False)
    begun = a_pod(0, node_ready=False)

    for pod in (bound, begun):
        assert acts(decide(a_job(1), pod, written=NEVER_JOINED)) == [("kill", 0, 0), ("create", 0, 1)]
    assert decide(a_job(1), a_pod(0, phase="Pending", node_ready=None), written=NEVER_JOINED).actions == ()


def test_when_the_nodes_of_all_workers_are_dead_all_are_replaced() -> None:
    agents = [an_agent(slot, heard=NOON - 11) for slot in range(2)]
    view = a_view(*agents, current=a_generation(1, (0, 0), (1, 0)))

    decision = decide(a_job(2), *[a_pod(slot, node_ready=False) for slot in range(2)], view=view)

    assert acts(decision) == [("kill", 0, 0), ("create", 0, 1), *REPLACED]
    assert decision.want.pods == {(0, 1), (1, 1)}
    assert decision.actions[1].placement.never == frozenset()  # type: ignore[union-attr]


# --- silence ----------------------------------------------------------------------------------------------------------


def alone(silent_for: float, **pod: Any) -> tuple[Pod, dict[str, Any]]:
    agent = an_agent(0, heard=NOON - silent_for)
    return a_pod(0, **pod), {"view": a_view(agent, current=a_generation(1, (0, 0))), "state": "training"}


@pytest.mark.parametrize(
    ("silent_for", "node_ready", "replaced"),
    [(11, False, True), (29, True, False), (29, None, False), (31, True, True), (31, None, True)],
)
def test_the_only_worker_is_given_up_after_a_while_of_silence(
    silent_for: float, node_ready: bool | None, replaced: bool
) -> None:
    pod, fields = alone(silent_for, node_ready=node_ready)

    decision = decide(a_job(1), pod, **fields)

    assert acts(decision) == ([("kill", 0, 0), ("create", 0, 1)] if replaced else [])
    assert decision.want.pods == {(0, int(replaced))}


def test_somebody_looks_when_the_patience_with_the_only_worker_is_over() -> None:
    pod, fields = alone(1)

    assert decide(a_job(1), pod, **fields).requeue_after == 29.0


def test_an_operator_that_was_interrupted_itself_blames_no_worker() -> None:
    pod, fields = alone(600)

    decision = decide(a_job(1), pod, healthy_since=NOON - 20, **fields)

    assert decision.actions == ()
    assert decision.requeue_after == 10.0


def test_a_new_operator_gives_the_workers_time_to_come_back() -> None:
    dead = a_pod(0, node_ready=False)

    early = decide(a_job(1), dead, heard={(0, 0): NOON - 9})
    late = decide(a_job(1), dead, heard={(0, 0): NOON - 10})

    assert (acts(early), early.requeue_after) == ([], 1.0)
    assert acts(late) == [("kill", 0, 0), ("create", 0, 1)]


def test_an_agent_that_a_new_operator_never_heard_is_waited_for_longer_than_one_that_fell_silent() -> None:
    pods, view = (a_pod(0), a_pod(1)), a_view(an_agent(0), current=a_generation(2, (0, 0)))

    early = decide(a_job(2), *pods, view=view, heard={(1, 0): NOON - 9})
    late = decide(a_job(2), *pods, view=view, heard={(1, 0): NOON - 10})

    assert (acts(early), early.requeue_after) == ([], 1.0)
    assert acts(late) == REPLACED


def test_of_two_workers_neither_is_replaced_while_no_agent_is_heard() -> None:
    agents = [an_agent(slot, heard=NOON - 600) for slot in range(2)]
    view = a_view(*agents, current=a_generation(1, (0, 0), (1, 0)))

    assert decide(a_job(2), a_pod(0), a_pod(1), view=view).actions == ()


def test_the_only_one_that_ever_joined_is_alone_although_others_are_pending() -> None:
    pod, fields = alone(31)
    other = a_stuck_pod(1)
    slots = (SlotMemory(slot=0, attempt=0, joined=True), SlotMemory(slot=1, attempt=0, kept_from=()))

    decision = decide(a_job(2), pod, other, written=JobStatus(bookkeeping=Bookkeeping(slots=slots)), **fields)

    assert acts(decision) == [("kill", 0, 0), ("create", 0, 1)]


# --- the start --------------------------------------------------------------------------------------------------------


def starting(seconds: float, **pod: Any) -> Observed:
    seen = observed(a_job(1), a_pod(0, **pod), written=NEVER_JOINED)
    return replace(seen, workers=tuple(replace(worker, starting_seconds=seconds) for worker in seen.workers))


def test_a_worker_whose_agent_never_says_hello_is_ended_and_counts_as_failed() -> None:
    early, late = (plan(a_job(1), starting(seconds), NOON) for seconds in (100.0, 120.0))

    assert (acts(early), early.requeue_after) == ([], 20.0)
    assert acts(late) == [("kill", 0, 0)], "the next attempt waits until this one is gone and counted"
    assert late.want.pods == frozenset()


def test_the_time_of_the_start_counts_from_when_the_pod_was_first_seen_to_run() -> None:
    pending = observed(a_job(1), a_pod(0, phase="Pending"), written=NEVER_JOINED)
    running = observed(a_job(1), a_pod(0), written=NEVER_JOINED)

    assert pending.history.starting == {}
    assert running.history.starting == {(0, 0): NOON}
    assert observed(a_job(1), a_pod(0), view=a_view(an_agent(0))).history.starting == {}


# --- pods that were made in vain --------------------------------------------------------------------------------------


def made(pod: Pod, **memory: Any) -> JobStatus:
    return JobStatus(bookkeeping=Bookkeeping(slots=(SlotMemory(slot=pod.slot, attempt=pod.attempt, **memory),)))


def test_a_pod_that_cannot_start_is_recreated_when_the_spec_changed() -> None:
    pod = a_stuck_pod(0, "ImagePullBackOff")

    same = decide(a_job(1, generation=3), pod, written=made(pod, spec_generation=3))
    mended = decide(a_job(1, generation=4), pod, written=made(pod, spec_generation=3))

    assert same.actions == ()
    assert acts(mended) == [("kill", 0, 0), ("create", 0, 1)]


def test_a_pod_that_runs_or_is_on_its_way_is_not_recreated_for_a_change_of_the_spec() -> None:
    for pod in (a_pod(0), a_pod(0, phase="Pending")):
        assert decide(a_job(1, generation=4), pod, written=made(pod, spec_generation=3)).actions == ()


def test_a_pod_found_without_a_record_counts_as_made_from_the_spec_of_now() -> None:
    assert observed(a_job(1, generation=4), a_pod(0), written=JobStatus()).history.slots[0].spec_generation == 4


def test_a_pod_kept_from_a_node_is_recreated_once_it_need_not_be() -> None:
    pod = a_stuck_pod(1)
    written = made(pod, spec_generation=0, kept_from=("node-9",))
    others = {"view": a_view(an_agent(0), current=a_generation(1, (0, 0)))}
    excluded = (Suspect(node="node-9", silent_at=NOON - 100),)

    kept = decide(a_job(2), a_pod(0), pod, written=written, suspects=excluded, **others)
    free = decide(a_job(2), a_pod(0), pod, written=written, **others)

    assert (acts(kept), kept.requeue_after) == ([], 20.0)
    assert acts(free) == REPLACED


def test_a_pod_that_may_go_anywhere_waits_for_a_place_as_long_as_it_takes() -> None:
    pod = a_stuck_pod(0, created_at=NOON - 86400)

    assert decide(a_job(1), pod, written=made(pod, spec_generation=0, kept_from=())).actions == ()


def test_a_pod_with_unknown_excluded_nodes_is_recreated_once() -> None:
    def attempt(age: float) -> Decision:
        pod = a_stuck_pod(0, created_at=NOON - age)
        return decide(a_job(1), pod, written=made(pod, spec_generation=0))

    assert attempt(100).actions == ()
    assert acts(attempt(200)) == [("kill", 0, 0), ("create", 0, 1)]


# --- refusals, grace, the end -----------------------------------------------------------------------------------------


def test_after_a_refusal_pods_are_asked_for_again_in_time() -> None:
    waiting = decide(a_job(1), refusal=PodRefusal("QuotaExceeded", "no", 1, retry_at=NOON + 4))
    again = decide(a_job(1), refusal=PodRefusal("QuotaExceeded", "no", 1, retry_at=NOON))

    assert (acts(waiting), waiting.requeue_after) == ([], 4.0)
    assert acts(again) == [("create", 0, 0)]


def test_new_workers_and_those_taken_away_have_the_time_that_saves_were_seen_to_take() -> None:
    view = a_view(an_agent(0), an_agent(2), current=a_generation(2, (0, 0)))

    decision = decide(a_job(2), a_pod(0), a_pod(2), view=view, grace_seconds=90.0)

    create, delete = decision.actions
    assert isinstance(create, CreatePod)
    assert create.placement.grace_seconds == 90.0
    assert delete == DeletePod(a_pod(2), 90.0)


def test_the_coordinator_is_told_that_ranks_wait() -> None:
    waits = Obstacle(reason="StorageUnavailable", message="m")

    assert decide(a_job(1), a_pod(0), ranks_wait=waits).want.ranks_wait
    assert not decide(a_job(1), a_pod(0)).want.ranks_wait


def test_new_workers_avoid_suspects() -> None:
    crashes = tuple(NodeFailure(time=NOON - ago, cause="Error") for ago in (60, 30))
    recent, old = Suspect(node="a", failures=crashes), Suspect(node="b", quarantined_at=NOON - 90_000, avoided=True)

    (create,) = decide(a_job(1), suspects=(recent, old)).actions

    assert isinstance(create, CreatePod)
    assert create.placement.rather_not == {"a"}, "what the status says may be out of date"


def ended(phase: str, condition: str, seconds_ago: float) -> JobStatus:
    moment = datetime.fromtimestamp(NOON - seconds_ago, UTC).isoformat()
    since = Condition(type=condition, status="True", reason="R", last_transition_time=moment)
    return JobStatus.model_validate({"phase": phase, "reason": "R", "message": "m", "conditions": (since,)})


@pytest.mark.parametrize(("phase", "condition"), [("Succeeded", "Complete"), ("Failed", "Failed")])
def test_a_job_is_deleted_when_its_time_after_the_end_is_over(phase: str, condition: str) -> None:
    job, dead = a_job(1, ttl="1h"), a_pod(0, phase="Succeeded")

    early = decide(job, dead, written=ended(phase, condition, 3000))
    late = decide(job, dead, written=ended(phase, condition, 3600))

    assert (early.actions, early.requeue_after) == ((), 600.0)
    assert late.actions == (DeleteJob(),)


def test_a_job_is_not_deleted_without_a_time_nor_suspended_nor_while_workers_live() -> None:
    late = ended("Succeeded", "Complete", 10_000)

    assert decide(a_job(1), written=late).actions == ()
    assert DeleteJob() not in decide(a_job(1, ttl="0s"), a_pod(0), written=late).actions
    suspended = decide(a_job(1, ttl="0s", suspend=True), written=ended("Suspended", "Suspended", 10_000))
    assert suspended.actions == ()
