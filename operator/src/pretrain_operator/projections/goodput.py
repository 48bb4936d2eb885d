"""Where the time went: every second of a job's life is in exactly one state."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain_api.status.job import Goodput, GoodputState

WITHOUT_WORKERS: tuple[GoodputState, ...] = ("queued", "suspended")
"""Time in which no worker runs: it lowers no ratio."""


class Timeline:
    """The states of a job one after another. Time only moves on: what came late counts from where the line ends.

    `counted_until` is the end of the line; the seconds after it belong to `state` once something says how far it
    lasted. So an idle job's goodput does not change, and an operator's outage is filled in by what it hears afterwards.
    """

    def __init__(
        self,
        state: GoodputState = "queued",
        counted_until: float | None = None,
        seconds: Mapping[GoodputState, float] | None = None,
    ) -> None:
        self.state: GoodputState = state
        self.counted_until = counted_until
        self._seconds: dict[GoodputState, float] = dict(seconds or {})

    def switch(self, state: GoodputState, at: float) -> None:
        """The present state lasted until `at`, then `state` began."""
        self.spend(at, {}, self.state)
        self.state = state

    def spend(self, until: float, parts: Mapping[GoodputState, float], rest: GoodputState) -> None:
        """Count the time up to `until`: of it `parts`, as far as there is so much, and what is left as `rest`."""
        start = until if self.counted_until is None else self.counted_until
        left = max(0.0, until - start)
        for state, seconds in parts.items():
            taken = min(max(0.0, seconds), left)
            self._add(state, taken)
            left -= taken
        self._add(rest, left)
        self.counted_until = max(start, until)

    def goodput(self) -> Goodput:
        """The seconds of each state up to `counted_until`, and the share of training."""
        working = sum(seconds for state, seconds in self._seconds.items() if state not in WITHOUT_WORKERS)
        ratio = self._seconds.get("training", 0.0) / working if working else 0.0
        return Goodput(ratio=ratio, seconds=dict(self._seconds))

    def _add(self, state: GoodputState, seconds: float) -> None:
        if seconds:
            self._seconds[state] = self._seconds.get(state, 0.0) + seconds
