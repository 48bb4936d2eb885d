"""Numbered reports of this agent, kept until the coordinator acknowledges them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from pretrain_api.messages.protocol import Report
from pretrain_api.messages.reports import ReportBody, StepDone

MAX_STEPS = 100_000
"""Steps kept through an outage of the coordinator: about 30 MB, an hour and a half at 20 steps a second."""


class ReportBuffer:
    """Reports numbered from 1. Unacknowledged reports are sent again, in order, on the next connection.

    Beyond `max_steps` the oldest steps are dropped, which leaves a gap; all other kinds are always kept.
    """

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._pending: OrderedDict[int, Report] = OrderedDict()
        self._steps: OrderedDict[int, None] = OrderedDict()
        self.last_seq = 0
        """Number of the latest report; 0 before the first."""
        self.dropped = 0
        """Steps dropped before they were acknowledged."""

    def add(self, generation: int, time: float, body: ReportBody) -> Report:
        """Add a report under the next number. `time` is in unix seconds."""
        self.last_seq += 1
        report = Report(seq=self.last_seq, generation=generation, time=time, body=body)
        self._pending[report.seq] = report
        if isinstance(body, StepDone):
            self._steps[report.seq] = None
            self._drop_surplus_steps()
        return report

    def acknowledge(self, seq: int) -> None:
        """Drop all reports up to and including `seq`."""
        while self._pending and (oldest := next(iter(self._pending))) <= seq:
            del self._pending[oldest]
            self._steps.pop(oldest, None)

    def after(self, seq: int) -> Iterator[Report]:
        """Iterate over the kept reports above `seq`, in order. Reports may be added and dropped meanwhile."""
        if not self._pending:
            return
        for number in range(max(seq + 1, next(iter(self._pending))), self.last_seq + 1):
            if (report := self._pending.get(number)) is not None:
                yield report

    @property
    def is_empty(self) -> bool:
        """All reports are acknowledged."""
        return not self._pending

    def _drop_surplus_steps(self) -> None:
        while len(self._steps) > self._max_steps:
            seq, _ = self._steps.popitem(last=False)
            del self._pending[seq]
            self.dropped += 1
