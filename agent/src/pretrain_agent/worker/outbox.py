"""Reports of this agent, numbered, kept until the coordinator has acknowledged them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from pretrain_api.messages.protocol import Report
from pretrain_api.messages.reports import ReportBody, StepDone

MAX_STEPS = 100_000
"""Steps kept through an outage of the coordinator: about 30 MB, an hour and a half at 20 steps a second."""


class Outbox:
    """Numbers rise by one from 1. What is not acknowledged is sent again on the next connection, in order.

    Beyond `max_steps` the oldest steps are forgotten, which leaves a gap; all other kinds are always kept.
    """

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._pending: OrderedDict[int, Report] = OrderedDict()
        self._steps: OrderedDict[int, None] = OrderedDict()
        self.last_seq = 0
        """The number of the newest report; 0 before the first."""
        self.dropped = 0
        """Steps forgotten before they were acknowledged."""

    def add(self, generation: int, time: float, body: ReportBody) -> Report:
        """Number a report and keep it. `time` is in unix seconds."""
        self.last_seq += 1
        report = Report(seq=self.last_seq, generation=generation, time=time, body=body)
        self._pending[report.seq] = report
        if isinstance(body, StepDone):
            self._steps[report.seq] = None
            self._forget_surplus_steps()
        return report

    def acknowledge(self, seq: int) -> None:
        """Forget all reports up to and including `seq`."""
        while self._pending and (oldest := next(iter(self._pending))) <= seq:
            del self._pending[oldest]
            self._steps.pop(oldest, None)

    def after(self, seq: int) -> Iterator[Report]:
        """The kept reports with numbers above `seq`, in order. Reports may be added and forgotten meanwhile."""
        if not self._pending:
            return
        for number in range(max(seq + 1, next(iter(self._pending))), self.last_seq + 1):
            if (report := self._pending.get(number)) is not None:
                yield report

    @property
    def is_empty(self) -> bool:
        """All reports are acknowledged."""
        return not self._pending

    def _forget_surplus_steps(self) -> None:
        while len(self._steps) > self._max_steps:
            seq, _ = self._steps.popitem(last=False)
            del self._pending[seq]
            self.dropped += 1
