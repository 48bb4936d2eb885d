"""The pods that should exist: every row of the table of `plan`."""

from __future__ import annotations

from typing import Any

from pretrain_api.messages.reports import Failed, Finished
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Bookkeeping, Condition, JobStatus, SlotMemory
from pretrain_operator.cluster import Pod, Snapshot
from pretrain_operator.coordinator.types import CoordinatorView
from pretrain_operator.decide.actions import CreatePod, DeletePod, EndAgents
from pretrain_operator.decide.lifecycle import LifecycleVerdict
from pretrain_operator.decide.plan import Decision, plan
from pretrain_operator.decide.pod_history import PodHistory
from support.operator.world import NOON, a_generation, a_job, a_pod, a_view, an_agent, observed


def decide(
    job: PretrainJob,
    *pods: Pod,
    view: CoordinatorView | None = None,
    written: JobStatus | None = None,
    stopping: bool = False,
    **fields: Any,
) -> Decision:
    seen = observed(job, *pods, view=view, written=written, stopping=stopping, **fields)
    assert plan(job, seen, NOON) == plan(job, seen, NOON), "the same input gives the same decision"
    return plan(job, seen, NOON)


def three_training() -> dict[str, Any]:
    agents = [an_agent(slot) for slot in range(3)]
    return {"view": a_view(*agents, current=a_generation(1, (0, 0), (1, 0), (2, 0))), "state": "training"}


def test_a_new_job_gets_a_pod_for_every_slot() -> None:
    decision = decide(a_job(2))

    assert decision.actions == (CreatePod(0, 0), CreatePod(1, 0))
    assert (decision.verdict.phase, decision.verdict.reason) == ("Pending", "WaitingForWorkers")


def test_pods_that_are_about_to_be_created_may_join_at_once() -> None:
    assert decide(a_job(2)).want.pods == {(0, 0), (1, 0)}


def test_spares_have_pods_too_but_are_not_wanted_in_the_generation() -> None:
    decision = decide(a_job(2, spares=1))

    assert len(decision.actions) == 3
    assert decision.want.replicas == 2


def test_the_coordinator_is_asked_for_whole_replicas_of_the_model() -> None:
    want = decide(a_job(6, minimum=3, maximum=7, tensor=2)).want

    assert (want.replicas, want.min, want.replica_quantum) == (6, 4, 2)


def test_a_job_with_all_its_pods_needs_nothing() -> None:
    decision = decide(a_job(3), a_pod(0), a_pod(1), a_pod(2), **three_training())

    assert decision.actions == ()
    assert decision.requeue_after is None
    assert decision.verdict.phase == "Training"
    assert decision.want.pods == {(0, 0), (1, 0), (2, 0)}


def test_a_lost_worker_that_had_joined_is_replaced_at_once_by_the_next_attempt() -> None:
    decision = decide(a_job(3), a_pod(0), a_pod(1, 4, "Failed"), a_pod(2), **three_training())

    assert decision.actions == (CreatePod(1, 5),)
    assert decision.want.pods == {(0, 0), (1, 5), (2, 0)}


def test_a_pod_that_is_gone_altogether_is_replaced_by_an_attempt_never_used() -> None:
    written = JobStatus(bookkeeping=Bookkeeping(slots=(SlotMemory(slot=1, attempt=7, joined=True),)))

    decision = decide(a_job(2), a_pod(0), written=written)

    assert decision.actions == (CreatePod(1, 8),)


def test_an_attempt_known_to_agents_only_is_not_used_again() -> None:
    decision = decide(a_job(1), view=a_view(an_agent(0, 5, connected=False)))

    assert decision.actions == (CreatePod(0, 6),)


def test_workers_that_ended_well_unheard_are_not_replaced_before_the_others_had_time_to_tell_why() -> None:
    there = (a_pod(0), a_pod(1, 0, "Succeeded"), a_pod(2, 0, "Succeeded"))
    new_operator = {"state": "training", "healthy_since": NOON - 4.0}

    waiting = decide(a_job(3), *there, **new_operator)

    assert waiting.actions == ()
    assert waiting.requeue_after == 6.0
    told = a_view(an_agent(0), finished=Finished(step=9, tokens=9, checkpoint="c"))
    assert decide(a_job(3), *there, view=told, **new_operator).verdict.phase == "Succeeded"
    late = decide(a_job(3), *there, **{**new_operator, "healthy_since": NOON - 11.0})
    assert late.actions == (CreatePod(1, 1), CreatePod(2, 1))


def test_workers_terminated_by_a_suspension_are_replaced_at_once_when_it_is_over() -> None:
    decision = decide(a_job(1), a_pod(0, 0, "Succeeded"), state="queued", healthy_since=NOON)

    assert decision.actions == (CreatePod(0, 1),)


def test_what_is_left_of_a_replaced_pod_is_removed() -> None:
    dead, living = a_pod(0, 0, "Failed"), a_pod(0, 1)

    assert decide(a_job(1), dead, living).actions == (DeletePod(dead, 0.0),)


def test_what_is_left_of_a_pod_stays_until_its_attempt_is_on_record() -> None:
    decision = decide(a_job(1), a_pod(0, 0, "Failed"), a_pod(0, 1), written=JobStatus())

    assert decision.actions == ()


def test_of_two_living_pods_of_a_slot_the_older_one_goes() -> None:
    old, new = a_pod(0, 0), a_pod(0, 1)

    decision = decide(a_job(1), old, new)

    assert decision.actions == (DeletePod(old, 0.0),)
    assert decision.want.pods == {(0, 1)}


def test_a_pod_that_is_being_deleted_keeps_its_slot_until_it_is_gone() -> None:
    decision = decide(a_job(1), a_pod(0, deleting=True))

    assert decision.actions == ()
    assert decision.want.pods == {(0, 0)}


def test_a_worker_out_of_the_generation_and_silent_is_killed_and_replaced() -> None:
    stopped = a_pod(1)
    view = a_view(an_agent(0), an_agent(1, heard=NOON - 6), current=a_generation(2, (0, 0)))

    decision = decide(a_job(2), a_pod(0), stopped, view=view)

    assert decision.actions == (DeletePod(stopped, 0.0), CreatePod(1, 1))
    assert decision.want.pods == {(0, 0), (1, 1)}


def test_a_silent_worker_is_given_a_few_seconds_to_come_back() -> None:
    view = a_view(an_agent(0), an_agent(1, heard=NOON - 2), current=a_generation(2, (0, 0)))

    decision = decide(a_job(2), a_pod(0), a_pod(1), view=view)

    assert decision.actions == ()
    assert decision.requeue_after == 3.0


def test_a_silent_member_of_the_generation_is_the_coordinators_business() -> None:
    view = a_view(an_agent(0), an_agent(1, heard=NOON - 60), current=a_generation(1, (0, 0), (1, 0)))

    assert decide(a_job(2), a_pod(0), a_pod(1), view=view).actions == ()


def test_with_no_agent_heard_at_all_no_worker_is_replaced() -> None:
    view = a_view(an_agent(0, heard=NOON - 60), an_agent(1, heard=NOON - 60))

    assert decide(a_job(2), a_pod(0), a_pod(1), view=view).actions == ()


def test_a_pod_that_never_joined_is_replaced_at_once_the_first_time() -> None:
    decision = decide(a_job(1), a_pod(0, 0, "Failed"), written=JobStatus())

    assert decision.actions == (CreatePod(0, 1),)


def test_pods_that_never_join_are_replaced_later_and_later() -> None:
    waits: list[float | None] = []
    for failures in range(1, 5):
        slot = SlotMemory(slot=0, attempt=failures, failures=failures, failed_at=NOON, counted=True)
        waits.append(decide(a_job(1), written=JobStatus(bookkeeping=Bookkeeping(slots=(slot,)))).requeue_after)

    assert waits == [None, 1.0, 2.0, 4.0]


def test_a_worker_that_joined_forgets_its_failures() -> None:
    slot = SlotMemory(slot=0, attempt=3, failures=3, failed_at=NOON)
    written = JobStatus(bookkeeping=Bookkeeping(slots=(slot,)))
    snapshot = Snapshot(a_job(1), written, (a_pod(0, 3),))

    history = PodHistory.of(written).advance(snapshot, a_view(an_agent(0, 3)), NOON, running=True)

    assert history.slots[0].failures == 0


def test_scale_down_first_takes_the_highest_slots_out_of_the_generation() -> None:
    decision = decide(a_job(2), a_pod(0), a_pod(1), a_pod(2), **three_training())

    assert decision.want.remove_slots == {2}
    assert decision.want.replicas == 2
    assert decision.want.pods == {(0, 0), (1, 0), (2, 0)}
    assert decision.actions == ()


def test_scale_down_then_deletes_the_pod_gracefully() -> None:
    extra = a_pod(2)
    view = a_view(*[an_agent(slot) for slot in range(3)], current=a_generation(2, (0, 0), (1, 0)))

    decision = decide(a_job(2), a_pod(0), a_pod(1), extra, view=view)

    assert decision.actions == (DeletePod(extra, 30.0),)


def test_a_dead_pod_beyond_the_wanted_ones_is_removed() -> None:
    dead = a_pod(2, 0, "Succeeded")

    assert decide(a_job(2), a_pod(0), a_pod(1), dead).actions == (DeletePod(dead, 0.0),)


def test_bounds_and_waits_of_the_job_reach_the_coordinator() -> None:
    job = a_job(3, minimum=2, maximum=4, recovery={"hang": {"timeout": "90s"}})

    want = decide(job).want

    assert (want.replicas, want.min, want.max, want.hang_timeout, want.running) == (3, 2, 4, 90.0, True)


def test_replicas_are_kept_within_min_and_max() -> None:
    job = a_job(3, minimum=2, maximum=4)
    workers = job.spec.workers

    def scaled(replicas: int) -> PretrainJob:
        changed = workers.model_copy(update={"replicas": replicas})
        return job.model_copy(update={"spec": job.spec.model_copy(update={"workers": changed})})

    assert decide(scaled(9)).want.replicas == 4
    assert decide(scaled(1)).want.replicas == 2


# --- the end ----------------------------------------------------------------------------------------------------------


def ended(phase: str, condition: str, seconds_ago: float) -> JobStatus:
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(NOON - seconds_ago, UTC).isoformat()
    since = Condition(type=condition, status="True", reason="R", last_transition_time=moment)
    return JobStatus.model_validate({"phase": phase, "reason": "R", "message": "m", "conditions": (since,)})


def test_a_finished_job_is_written_down_before_its_agents_go() -> None:
    done = Finished(step=100, tokens=1, checkpoint="c")

    decision = decide(a_job(1), a_pod(0), view=a_view(an_agent(0), finished=done))

    assert (decision.verdict.phase, decision.verdict.reason) == ("Succeeded", "Completed")
    assert decision.actions == ()
    assert decision.want.running is False


def test_the_agents_of_a_finished_job_go_once_it_is_written() -> None:
    decision = decide(a_job(1), a_pod(0), view=a_view(an_agent(0)), written=ended("Succeeded", "Complete", 1))

    assert decision.actions == (EndAgents("succeeded", "m"),)
    assert decision.requeue_after == 4.0


def test_pods_that_linger_after_the_end_are_deleted() -> None:
    pod = a_pod(0)

    decision = decide(a_job(1), pod, written=ended("Failed", "Failed", 6))

    assert decision.actions == (DeletePod(pod, 30.0),)


def test_a_worker_that_never_joined_is_not_waited_for_at_the_end() -> None:
    starting = a_pod(1)

    decision = decide(a_job(2), a_pod(0), starting, view=a_view(an_agent(0)), written=ended("Succeeded", "Complete", 1))

    assert decision.actions == (EndAgents("succeeded", "m"), DeletePod(starting, 30.0))
    assert decision.requeue_after == 4.0


def test_the_dead_pods_of_an_ended_job_stay_for_their_logs() -> None:
    decision = decide(a_job(1), a_pod(0, 0, "Failed"), written=ended("Failed", "Failed", 60))

    assert decision.actions == ()
    assert (decision.verdict.phase, decision.verdict.reason) == ("Failed", "R")


def test_a_failure_that_no_restart_mends_ends_the_job() -> None:
    fatal = Failed(rank=1, exit_code=2, reason="ConfigInvalid", message="context is too long", retryable=False)

    decision = decide(a_job(1), a_pod(0), view=a_view(an_agent(0), fatal=fatal))

    assert decision.verdict.phase == "Failed"
    assert (decision.verdict.reason, decision.verdict.message) == ("ConfigInvalid", "context is too long")


def test_a_stop_first_asks_for_a_checkpoint() -> None:
    decision = decide(a_job(3), a_pod(0), a_pod(1), a_pod(2), stopping=True, **three_training())

    assert decision.want.running is False
    assert decision.actions == ()
    assert (decision.verdict.phase, decision.verdict.reason) == ("Holding", "Stopping")


def test_a_stop_shuts_down_the_agents_once_the_checkpoint_is_committed() -> None:
    view = a_view(an_agent(0), current=a_generation(1, (0, 0)), holding=True)

    first = decide(a_job(1), a_pod(0), view=view, stopping=True)
    then = decide(a_job(1), a_pod(0), view=view, stopping=True, written=ended("Suspended", "Suspended", 0))

    assert (first.verdict.phase, first.verdict.reason, first.actions) == ("Suspended", "Stopped", ())
    assert isinstance(then.actions[0], EndAgents)
    assert then.actions[0].reason == "suspended"


def test_a_stop_without_training_suspends_at_once_and_replaces_no_worker() -> None:
    decision = decide(a_job(2), a_pod(0, 0, "Failed"), stopping=True)

    assert (decision.verdict.phase, decision.actions) == ("Suspended", ())


def test_suspending_waits_for_the_checkpoint_as_well() -> None:
    training = decide(a_job(3, suspend=True), a_pod(0), a_pod(1), a_pod(2), **three_training())
    idle = decide(a_job(3, suspend=True))

    assert (training.verdict.phase, training.verdict.reason) == ("Holding", "Suspending")
    assert (idle.verdict.phase, idle.verdict.reason) == ("Suspended", "Suspended")


def test_a_suspended_job_keeps_no_pods() -> None:
    written = ended("Suspended", "Suspended", 6).model_copy(
        update={"bookkeeping": Bookkeeping(slots=(SlotMemory(slot=1, attempt=0),))}
    )
    alive, dead = a_pod(0), a_pod(1, 0, "Succeeded")

    decision = decide(a_job(2, suspend=True), alive, dead, written=written)

    assert decision.actions == (DeletePod(dead, 0.0), DeletePod(alive, 30.0))


# --- phases -----------------------------------------------------------------------------------------------------------


def test_the_phase_says_what_the_job_does() -> None:
    pods = (a_pod(0), a_pod(1))
    agents = (an_agent(0), an_agent(1))
    current = a_generation(1, (0, 0), (1, 0))

    def phase(view: CoordinatorView, **fields: Any) -> tuple[str, str]:
        verdict = decide(a_job(2), *pods, view=view, **fields).verdict
        return verdict.phase, verdict.reason

    assert phase(a_view(an_agent(0)), state="starting") == ("Starting", "WorkersJoining")
    assert phase(a_view(*agents, current=current), state="restoring") == ("Starting", "RanksStarting")
    assert phase(a_view(*agents, current=current), state="redoing") == ("Training", "Training")
    assert phase(a_view(*agents), state="recovering", recovering="Hang") == ("Recovering", "Hang")
    assert decide(
        a_job(2, minimum=2), *pods, view=a_view(an_agent(0)), state="recovering", recovering="Hang"
    ).verdict == (LifecycleVerdict("Recovering", "Hang", "waiting for workers: 1 of at least 2 are connected"))
    assert phase(a_view(*agents, current=current), state="holding") == ("Holding", "Resizing")
