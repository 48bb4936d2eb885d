"""The chains of policies for one slot: which policy decides, and why."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain_api.status.job import Bookkeeping, JobStatus, SlotMemory
from pretrain_operator.decide.observe import PodRefusal
from pretrain_operator.decide.plan import plan
from pretrain_operator.decide.replacement import deadlines, expired_deadline
from pretrain_operator.decide.workers import ObservedWorker
from support.operator.world import NOON, a_generation, a_job, a_pod, a_stuck_pod, a_view, an_agent, observed

HEARD = an_agent(1)
SILENT = an_agent(0, heard=NOON - 6)


def recorded(**fields: Any) -> JobStatus:
    return JobStatus(bookkeeping=Bookkeeping(slots=(SlotMemory(slot=0, attempt=0, **fields), NEIGHBOUR)))


NEIGHBOUR = SlotMemory(slot=1, attempt=0, joined=True)


@pytest.mark.parametrize(
    ("pods", "fields", "verdicts"),
    [
        ((a_pod(0),), {"view": a_view(an_agent(0), HEARD)}, [("keep", "Live")]),
        ((a_pod(0),), {"view": a_view(SILENT, HEARD)}, [("replace", "AgentLost"), ("create", "Missing")]),
        (
            (a_pod(0),),
            {"view": a_view(SILENT, HEARD, current=a_generation(1, (0, 0), (1, 0)))},
            [("keep", "Live")],
        ),
        (
            (a_pod(0, node_ready=False),),
            {"view": a_view(HEARD), "written": recorded()},
            [("replace", "NodeLost"), ("create", "Missing")],
        ),
        (
            (a_stuck_pod(0, created_at=NOON - 200),),
            {"view": a_view(HEARD), "written": recorded(spec_generation=7)},
            [("replace", "Outdated"), ("create", "Missing")],
        ),
        ((), {"view": a_view(HEARD), "written": recorded(joined=True)}, [("create", "Missing")]),
        (
            (),
            {"view": a_view(HEARD), "written": recorded(failures=3, failed_at=NOON - 1, counted=True)},
            [("wait", "Backoff")],
        ),
        (
            (),
            {"view": a_view(HEARD), "refusal": PodRefusal("QuotaExceeded", "no", 1, retry_at=NOON + 4)},
            [("wait", "QuotaExceeded")],
        ),
        (
            (a_pod(0, 0, "Succeeded"),),
            {"view": a_view(HEARD), "state": "training", "healthy_since": NOON - 4},
            [("wait", "FinalReport")],
        ),
    ],
    ids=[
        "a heard agent", "a silent agent outside the generation", "a silent member, which the coordinator judges",
        "a node that is not ready before the agent joined", "a pod of an older spec that cannot start",
        "no pod", "no pod after failed attempts", "no pod while the cluster refuses pods",
        "a success that its agent may still report",
    ],
)  # fmt: skip
def test_the_first_matching_policy_decides(
    pods: tuple[Any, ...], fields: dict[str, Any], verdicts: list[tuple[str, str]]
) -> None:
    job = a_job(2)

    decision = plan(job, observed(job, *pods, a_pod(1), **fields), NOON)

    assert [(verdict.action, verdict.reason) for verdict in decision.slots if verdict.slot == 0] == verdicts


def test_a_surplus_slot_is_drained_and_then_left_empty() -> None:
    job = a_job(1)

    draining = plan(job, observed(job, a_pod(0), a_pod(1), view=a_view(an_agent(0), HEARD)), NOON)
    drained = plan(job, observed(job, a_pod(0), a_pod(1, 0, "Succeeded"), view=a_view(an_agent(0))), NOON)

    assert [(verdict.action, verdict.reason) for verdict in draining.slots][1:] == [("drain", "ScaledDown")]
    assert [(verdict.action, verdict.reason) for verdict in drained.slots][1:] == [("leave", "ScaledDown")]


@pytest.mark.parametrize(
    ("worker", "alone", "reason"),
    [
        (ObservedWorker(a_pod(0), starting_seconds=120), False, "StartTimedOut"),
        (ObservedWorker(a_pod(0), starting_seconds=119), False, None),
        (ObservedWorker(a_pod(0, deleting=True), starting_seconds=500), False, None),
        (ObservedWorker(a_pod(0), SILENT, joined=True, silent_seconds=5), False, "AgentLost"),
        (ObservedWorker(a_pod(0), SILENT, joined=True, silent_seconds=4.9), False, None),
        (ObservedWorker(a_pod(0), joined=True, silent_seconds=9.9), False, None),
        (ObservedWorker(a_pod(0), joined=True, silent_seconds=10), False, "AgentLost"),
        (ObservedWorker(a_pod(0, node_ready=False), SILENT, joined=True, silent_seconds=2), False, "AgentLost"),
        (ObservedWorker(a_pod(0, node_ready=False), member=True, joined=True, absent_seconds=10), False, "NodeLost"),
        (ObservedWorker(a_pod(0), member=True, joined=True, absent_seconds=30), True, "AgentLost"),
        (ObservedWorker(a_pod(0), member=True, joined=True, absent_seconds=30), False, None),
    ],
    ids=[
        "its agent did not join in time", "its agent may still join", "its pod ends anyway",
        "silent for too long", "silent for a while", "not heard by this operator yet",
        "not heard by this operator at all",
        "silent on a node that is not ready", "a member on a node that is not ready", "the only agent",
        "one of several",
    ],
)  # fmt: skip
def test_a_worker_is_replaced_for_the_first_expired_deadline(
    worker: ObservedWorker, alone: bool, reason: str | None
) -> None:
    expired = expired_deadline(worker, alone=alone)

    assert (expired.reason if expired else None) == reason
    assert all(deadline.seconds_left > 0 for deadline in deadlines(worker, alone=alone)) == (reason is None)
