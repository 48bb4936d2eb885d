"""Goodput of a job as counters that never fall."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_api.status.job import GoodputState, JobStatus

STEP_STATES: tuple[GoodputState, ...] = ("training", "redoing")
"""States whose seconds come with each step; in other states nothing is reported until they end."""
FINAL_PHASES = ("Succeeded", "Failed")


class GoodputCounters:
    """Seconds of each goodput state, counted from zero as in any new process.

    The status has the seconds of all operators so far. A crash loses some of them, which would look like a reset of the
    counter if the status were exposed as it is.
    """

    def __init__(self) -> None:
        self._shown: dict[GoodputState, float] = {}
        self._carried: dict[GoodputState, float] = {}
        self._base: Mapping[GoodputState, float] = {}
        self._began = 0.0
        self._status = JobStatus()

    def began(self, status: JobStatus, now: float) -> None:
        """Continue from this status, whose seconds are counted already."""
        self._carried = self.seconds(now)
        self._base = _seconds(status)
        self._began = now
        self._status = status

    def reconciled(self, status: JobStatus) -> None:
        """Follow the newest status."""
        self._status = status

    def seconds(self, now: float) -> dict[GoodputState, float]:
        """Return the counters at this moment. The present state's seconds grow while nothing is reported.

        So a recovery that does not end shows.
        """
        status = self._status
        base = self._base
        grown: dict[GoodputState, float] = {
            state: seconds - base.get(state, 0.0) for state, seconds in _seconds(status).items()
        }
        state, until = status.bookkeeping.state, status.bookkeeping.counted_until
        if until is not None and state not in STEP_STATES and status.phase not in FINAL_PHASES:
            grown[state] = grown.get(state, 0.0) + max(0.0, now - max(until, self._began))
        shown = dict(self._shown)
        for state, seconds in grown.items():
            # The grown seconds may turn out to belong to another state; a counter that falls looks like a reset.
            shown[state] = max(shown.get(state, 0.0), self._carried.get(state, 0.0) + seconds)
        self._shown = shown
        return shown


def _seconds(status: JobStatus) -> Mapping[GoodputState, float]:
    return status.goodput.seconds if status.goodput is not None else {}
