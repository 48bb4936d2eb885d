"""What ranks said that outlives their generation."""

from __future__ import annotations

from pretrain_api.messages import reports
from pretrain_api.messages.protocol import Generation


class Memory:
    """Numbers, rejected checkpoints, and how the job ended."""

    def __init__(self, highest_number: int) -> None:
        self.highest = highest_number
        """The highest generation number known; a generation below it is over."""
        self.owned = highest_number > 0
        """The job has a record of its own in the lineage, or must be taken to have one."""
        self.rejected: tuple[str, ...] = ()
        self.finished: reports.Finished | None = None
        self.fatal: reports.Failed | None = None

    @property
    def over(self) -> bool:
        """No generation is formed any more."""
        return self.finished is not None or self.fatal is not None

    def next_number(self) -> int:
        """Take the next number."""
        self.highest += 1
        return self.highest

    def adopt(self, generation: Generation, step: int) -> None:
        """A generation that somebody else formed runs and has done so many steps."""
        self.rejected = generation.rejected
        self.owned = not generation.may_take_over or step > 0

    def learn(self, body: reports.ReportBody) -> None:
        """Keep what a rank of the current generation said."""
        match body:
            case reports.StepDone() | reports.Restored():
                self.owned = True
            case reports.Saved():
                self.rejected = ()
            case reports.CheckpointRejected():
                if body.checkpoint not in self.rejected:
                    self.rejected = (*self.rejected, body.checkpoint)
            case reports.NumberTaken():
                self.highest = max(self.highest, body.highest)
            case reports.RolledBack():
                self.highest = max(self.highest, body.number)
            case reports.Finished():
                self.finished = body
            case _:
                pass

    def condemn(self, body: reports.ReportBody) -> None:
        """Keep a failure that no restart mends."""
        if isinstance(body, reports.Failed) and not body.retryable and not self.over:
            self.fatal = body
