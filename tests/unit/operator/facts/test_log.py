"""Repetitions: each occurrence counts once, whichever ranks report it and however often an agent replays it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.checkpoint.lineage import Rollback, manifest_key
from pretrain_api.messages.reports import (
    Blocked,
    CheckpointRejected,
    Diverged,
    Evaluated,
    Failed,
    Held,
    Profiled,
    ReportBody,
    Resumed,
    RolledBack,
    Sampled,
    Saved,
    SaveFailed,
    Unblocked,
)
from pretrain_api.status.job import JobStatus
from pretrain_operator.facts.fact import Fact, GenerationAdopted, Reported
from pretrain_operator.facts.log import FactLog
from support.operator.ledger import Book
from support.operator.world import NOON, a_generation, a_restore, a_save, a_start, a_step, an_end, announced, said

ONE = a_generation(1, (0, 0), (1, 0))
BY_EVERY_RANK = (Held, Resumed, RolledBack, CheckpointRejected)


@dataclass
class Run:
    """Reports of one generation, in an order in which its agents may send them."""

    facts: list[Fact] = field(default_factory=lambda: [announced(0, ONE)])
    time: float = 0.0
    number: int = 1
    step: int = 0
    saved: tuple[int, int] = (1, 0)
    holds: int = 0

    def says(self, body: ReportBody, *slots: int) -> None:
        """Report from these workers, each a moment after the one before; without any from rank 0's."""
        for slot in slots or (0,):
            self.time += 0.125
            self.facts.append(said(self.time, 1, body, slot))

    def starts(self) -> None:
        self.says(a_start(0), 0)
        self.says(a_start(1), 1)
        self.says(a_restore(0))

    def steps(self) -> None:
        self.step += 1
        self.time += 1
        self.says(a_step(self.step))

    def saves(self) -> None:
        if self.saved < (self.number, self.step):
            self.saved = (self.number, self.step)
            self.says(a_save(self.step, self.number))
        else:
            self.says(SaveFailed(step=self.step, message="no space"))

    def evaluates(self) -> None:
        self.says(Evaluated(step=self.step, losses={"held-out": 1.0 / self.time}, seconds=0.1))
        for number in range(3):
            self.says(Sampled(step=self.step, number=number, prompt="", text=f"{self.step}, text {number}"))

    def holds_and_resumes(self) -> None:
        self.holds += 1
        self.saves()
        key = manifest_key(*self.saved)
        self.says(Held(command_id=f"c{self.holds}", step=self.step, checkpoint=key), 1, 0)
        self.time += 1
        self.says(Resumed(command_id=f"c{self.holds}", step=self.step), 0, 1)

    def drops(self) -> None:
        self.step += 1
        self.says(Diverged(step=self.step, since=self.step, cause="LossNotFinite", action="Drop"))

    def warns(self) -> None:
        self.says(Diverged(step=self.step + 1, since=self.step + 1, cause="LossSpike", action="Warn"))
        self.steps()

    def rolls_back(self) -> None:
        at = self.step + 1
        self.says(Diverged(step=at, since=at, cause="LossSpike", action="Rollback", seconds=0.5))
        self.number += 1
        self.step = self.saved[1]
        rollback = Rollback(
            generation=self.number, job_uid="uid", cause="LossSpike", step=at, since=at, to_step=self.step
        )
        checkpoint = manifest_key(*self.saved) if self.step else None
        self.saved = (self.number, self.step)
        report = RolledBack(number=self.number, rollback=rollback, checkpoint=checkpoint, count=self.number - 1)
        self.says(report, 1, 0)

    def waits(self) -> None:
        self.says(Blocked(reason="StorageUnavailable", message="no answer"))
        self.time += 5
        self.says(Unblocked())

    def records_a_profile(self) -> None:
        self.says(Profiled(command_id="p", rank=1, first_step=1, last_step=2, location="x", bytes=1), 1)


MOVES: tuple[Callable[[Run], None], ...] = (
    Run.steps, Run.steps, Run.steps, Run.saves, Run.evaluates, Run.holds_and_resumes, Run.drops, Run.warns,
    Run.rolls_back, Run.waits, Run.records_a_profile,
)  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> list[Fact]:
    run = Run()
    run.starts()
    run.steps()
    for move in draw(st.lists(st.sampled_from(MOVES), max_size=25)):
        move(run)
    return run.facts


def shown(status: JobStatus) -> dict[str, object]:
    """Return the status without the pace, which a new process measures from the steps that it sees."""
    return status.model_dump(exclude={"seconds_per_step"})


@settings(max_examples=200, deadline=None)
@given(facts=runs(), at=st.floats(0, 1), back=st.floats(0, 1))
def test_reports_replayed_to_a_new_operator_change_nothing(facts: list[Fact], at: float, back: float) -> None:
    crash = 1 + round(at * (len(facts) - 1))
    acknowledged = 1 + round(back * (crash - 1))
    without_crash, first = Book(), Book()
    without_crash.tell(*facts)
    first.tell(*facts[:crash])

    second = first.again()
    second.tell(GenerationAdopted(NOON, ONE), *facts[acknowledged:crash])
    assert shown(second.status) == shown(first.status), "a replay changes nothing"

    second.tell(*facts[crash:])
    assert shown(second.status) == shown(without_crash.status)


@settings(max_examples=200, deadline=None)
@given(facts=runs(), data=st.data())
def test_the_other_ranks_reports_of_an_occurrence_may_come_at_any_later_time(
    facts: list[Fact], data: st.DataObject
) -> None:
    firsts = [fact for fact in facts if not _is_second(fact, facts)]
    late: dict[int, list[Fact]] = {}
    for fact in facts:
        if _is_second(fact, facts):
            earliest = sum(first in facts[: facts.index(fact)] for first in firsts)
            late.setdefault(data.draw(st.integers(earliest, len(firsts))), []).append(fact)
    once, moved = Book(), Book()

    once.tell(*firsts)
    for index in range(len(firsts) + 1):
        moved.tell(*late.get(index, ()), *firsts[index : index + 1])

    assert moved.status.model_dump() == once.status.model_dump()
    assert (moved.told, moved.measurements) == (once.told, once.measurements)


def _is_second(fact: Fact, facts: list[Fact]) -> bool:
    """Recognise what another rank reported before."""
    if not isinstance(fact, Reported) or not isinstance(fact.body, BY_EVERY_RANK):
        return False
    return any(
        isinstance(other, Reported) and other.body == fact.body and other.slot != fact.slot
        for other in facts[: facts.index(fact)]
    )


def admitted(status: JobStatus, *facts: Fact) -> list[bool]:
    log = FactLog(status)
    return [log.admit(fact) is not None for fact in facts]


def test_a_checkpoint_is_rejected_once_by_all_ranks_and_again_after_training() -> None:
    rejected = CheckpointRejected(checkpoint=manifest_key(1, 3), message="digest differs")
    facts = (said(1, 2, rejected), said(1, 2, rejected, 1), said(2, 3, a_step(3)), said(3, 3, rejected))

    assert admitted(JobStatus(), *facts) == [True, False, True, True]


def test_a_new_operator_knows_which_checkpoint_the_open_incident_rejects() -> None:
    rejected = said(1, 1, CheckpointRejected(checkpoint=manifest_key(1, 3), message="digest: differs"))
    book = Book()
    book.tell(rejected, an_end(1, 1, "CheckpointRejected"))

    assert admitted(book.status, rejected) == [False]


def test_a_save_of_before_a_rollback_is_not_the_latest_checkpoint_again() -> None:
    run = Run()
    run.starts()
    for move in (Run.steps, Run.saves, Run.steps, Run.rolls_back):
        move(run)
    (saved,) = [fact for fact in run.facts if isinstance(fact, Reported) and isinstance(fact.body, Saved)]
    book = Book()
    book.tell(*run.facts)

    assert admitted(book.status, saved, said(20, 1, a_save(2, 2))) == [False, True]


def test_nothing_is_admitted_after_the_end_of_the_job() -> None:
    facts = (announced(1, ONE), said(1, 1, a_step(1)), an_end(2, 1), said(2, 1, Failed(rank=0, reason="Error")))

    assert admitted(JobStatus(phase="Failed"), *facts) == [False] * 4


def test_a_report_of_an_older_generation_is_outdated() -> None:
    late = said(3, 1, a_step(9))

    assert admitted(JobStatus(), said(1, 1, a_step(1)), said(2, 2, a_restore(1)), late) == [True, True, False]
    assert admitted(JobStatus(), said(1, 1, a_step(1)), replace(late, generation=2)) == [True, True]
