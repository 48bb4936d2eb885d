"""Durations of consecutive stages."""

from __future__ import annotations

import time


class StageTimer:
    """Measures one stage after the other; the first starts with the timer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, stage: str) -> None:
        """Attribute the time since the last call to this stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now
