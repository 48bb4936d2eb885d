"""The seconds of a job by what they were spent on, as counters that never fall."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_api.status.job import GoodputState, JobStatus

TOLD_STATES: tuple[GoodputState, ...] = ("training", "redoing")
"""Their seconds are said by the steps themselves; those of other states pass without a word."""
FINAL_PHASES = ("Succeeded", "Failed")


class GoodputCounters:
    """Counts from zero, as counters of a new process do: the seconds in the status are those of all operators so far,
    and what is lost of them in a crash would look like a counter that was reset."""

    def __init__(self) -> None:
        self._shown: dict[GoodputState, float] = {}
        self._carried: dict[GoodputState, float] = {}
        self._base: Mapping[GoodputState, float] = {}
        self._began = 0.0
        self._status = JobStatus()

    def began(self, status: JobStatus, now: float) -> None:
        """A service goes on from this status, whose seconds are counted already."""
        self._carried = self.seconds(now)
        self._base = _seconds(status)
        self._began = now
        self._status = status

    def looked(self, status: JobStatus) -> None:
        """The newest status."""
        self._status = status

    def seconds(self, now: float) -> dict[GoodputState, float]:
        """The counters at this moment. The present state's seconds run on while nothing is said, since a recovery that
        does not end must show."""
        status = self._status
        base = self._base
        grown: dict[GoodputState, float] = {
            state: seconds - base.get(state, 0.0) for state, seconds in _seconds(status).items()
        }
        state, until = status.bookkeeping.state, status.bookkeeping.counted_until
        if until is not None and state not in TOLD_STATES and status.phase not in FINAL_PHASES:
            grown[state] = grown.get(state, 0.0) + max(0.0, now - max(until, self._began))
        shown = dict(self._shown)
        for state, seconds in grown.items():
            # What ran on may turn out to belong to another state; a counter that falls would be taken for a new one.
            shown[state] = max(shown.get(state, 0.0), self._carried.get(state, 0.0) + seconds)
        self._shown = shown
        return shown


def _seconds(status: JobStatus) -> Mapping[GoodputState, float]:
    return status.goodput.seconds if status.goodput is not None else {}
