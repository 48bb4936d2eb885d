"""The rules of liveness on evidence made by hand."""

from __future__ import annotations

import pytest

from pretrain_api.messages.protocol import Member
from pretrain_operator.liveness.rules import GenerationEvidence, MemberEvidence, judge
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.liveness.timings import Timings

NOON = 1000.0


def a_member(rank: int) -> Member:
    return Member(agent_id=f"a{rank}", slot=rank, attempt=0, rank=rank, host="10.0.0.1", processes=1)


def evidence(closed_for: float, step_seconds: float) -> GenerationEvidence:
    """Rank 1 disconnected right after a step, this number of seconds ago; rank 0 is heard all the time."""
    broke = NOON - closed_for
    return GenerationEvidence(
        now=NOON,
        members=(MemberEvidence(a_member(0), "", NOON, None), MemberEvidence(a_member(1), "", broke, broke)),
        stepped=True,
        advanced_at=broke,
        active_at=broke,
        step_seconds=step_seconds,
        silence=1.0,
        clock=SilenceClock(heard_at=NOON),
        hang_timeout=60.0,
        verdict=None,
        suspicion=None,
    )


@pytest.mark.parametrize(
    ("closed_for", "step_seconds", "lost"),
    [
        (0.49, 0.1, False),
        (0.51, 0.1, True),
        (0.9, 1.0, False),
        (1.1, 1.0, True),
        (1.4, 0.0, False),
        (1.6, 0.0, True),
    ],
    ids=[
        "a moment ago", "longer ago than any reconnect takes", "within a long step", "longer than a long step",
        "by a coordinator that knows no step's time yet", "too long even for that one",
    ],
)  # fmt: skip
def test_a_broken_connection_is_a_loss_after_a_while_without_a_step(
    closed_for: float, step_seconds: float, lost: bool
) -> None:
    verdict = judge(evidence(closed_for, step_seconds), Timings())

    assert (verdict is not None and verdict.cause == "WorkerLost") == lost
