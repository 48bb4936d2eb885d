"""What the failures of a job come to: how much of its budget is spent, and whether a rule ends it."""

from __future__ import annotations

from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed
from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import Bookkeeping
from pretrain_operator.decide.budget import Spent, action_on, decisive, is_collective
from pretrain_operator.facts.fact import Ended

PROGRAM_CAUSES = ("RankFailed", "Hang", "CheckpointRejected")


class Charges:
    """Counts failures against the budget, each when its generation ends."""

    def __init__(self, books: Bookkeeping) -> None:
        self.spent = Spent(books.restarts, books.program_failures, books.last_failure)
        self.fatal = ""
        """A rule of the job says that the job ends: why."""
        self._failures: list[Failed] = []
        self._unexplained: Generation | None = None
        self._falls_back = False
        """The current generation found a checkpoint corrupt that nobody had found before."""

    @property
    def killed(self) -> bool:
        """Something else than the job killed ranks of the generation."""
        return any(failure.exit_code < 0 for failure in decisive(self._failures))

    def announced(self, generation: Generation) -> None:
        """The next generation begins."""
        if self._unexplained is not None and _agents(self._unexplained) <= _agents(generation):
            # Nobody was lost: the broken collective was the program's own failure.
            self.spent = self.spent.blamed_on_program()
        self._unexplained = None
        self._failures = []
        self._falls_back = False

    def corrupt(self) -> None:
        """A checkpoint was found corrupt."""
        self._falls_back = True

    def failed(self, body: Failed, recovery: Recovery) -> str:
        """A rank failed; returns what the job's rules say to that."""
        self._failures.append(body)
        action = action_on(body, recovery.rules)
        if action == "Fail":
            self.fatal = f"rank {body.rank} failed with exit code {body.exit_code} ({body.reason}): {body.message}"
        return action

    def pods_failed(self, count: int, time: float, message: str, recovery: Recovery) -> None:
        """So many pods ended before they joined."""
        for _ in range(count):
            self.spent = self.spent.failed(time, message, recovery.budget.window, program=False)

    def progressed(self) -> None:
        """A new checkpoint is in force: the budget is whole again."""
        self.spent = Spent()

    def ended(self, fact: Ended, generation: Generation | None, recovery: Recovery) -> None:
        """A generation ended by a fault: count it, unless the job's rules ignore it.

        A checkpoint found corrupt is free the first time: the next generation goes on from another one, and there are
        only so many.
        """
        if fact.cause == "CheckpointRejected" and self._falls_back:
            return
        causes = decisive(self._failures)
        if causes and all(action_on(failure, recovery.rules) == "Ignore" for failure in causes):
            return
        program = fact.cause in PROGRAM_CAUSES
        if fact.cause == "RankFailed" and causes and all(map(is_collective, causes)):
            program = False  # until the next generation shows whether a worker is gone
            self._unexplained = generation
        message = fact.message or (causes[0].message if causes else "")
        text = f"{fact.cause}: {message}" if message else fact.cause
        self.spent = self.spent.failed(fact.time, text, recovery.budget.window, program=program)


def _agents(generation: Generation) -> frozenset[str]:
    return frozenset(member.agent_id for member in generation.members)
