"""Coordinator state that outlives a generation: numbers, rejected checkpoints, the end of the job."""

from __future__ import annotations

from pretrain_api.bounds import MAX_NUMBER
from pretrain_api.messages import reports
from pretrain_api.messages.protocol import Generation

_HIGHEST_BELIEVED = MAX_NUMBER - 10**6
"""Leaves a million valid numbers to a job of which a worker reported the highest one."""


class LineageState:
    """Generation numbers, rejected checkpoints and the final report, as learned from ranks."""

    def __init__(self, highest_number: int) -> None:
        self.highest = highest_number
        """Highest known generation number; generations below it are over."""
        self.owned = highest_number > 0
        """The job has a lineage record of its own, or may have one."""
        self.rejected: tuple[str, ...] = ()
        self.finished: reports.Finished | None = None
        self.fatal: reports.Failed | None = None

    @property
    def over(self) -> bool:
        """No further generation is formed."""
        return self.finished is not None or self.fatal is not None

    def next_number(self) -> int:
        """Allocate the next generation number."""
        self.highest += 1
        return self.highest

    def learn_number(self, number: int) -> None:
        """Learn a generation number that a worker reported."""
        self.highest = max(self.highest, min(number, _HIGHEST_BELIEVED))

    def adopt(self, generation: Generation, step: int) -> None:
        """Learn from a running generation that another coordinator formed; `step`: steps it completed."""
        self.rejected = generation.rejected
        self.owned = not generation.may_take_over or step > 0

    def learn(self, body: reports.ReportBody) -> None:
        """Learn from a report of the current generation."""
        match body:
            case reports.StepDone() | reports.Restored():
                self.owned = True
            case reports.Saved():
                self.rejected = ()
            case reports.CheckpointRejected():
                if body.checkpoint not in self.rejected:
                    self.rejected = (*self.rejected, body.checkpoint)
            case reports.NumberTaken():
                self.learn_number(body.highest)
            case reports.RolledBack():
                self.learn_number(body.number)
            case reports.Finished():
                self.finished = body
            case _:
                pass

    def learn_fatal(self, body: reports.ReportBody) -> None:
        """Record a failure that no restart can fix."""
        if isinstance(body, reports.Failed) and not body.retryable and not self.over:
            self.fatal = body
