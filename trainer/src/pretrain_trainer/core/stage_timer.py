"""The seconds of one stage after the other."""

from __future__ import annotations

import time


class Stages:
    """Begins with the first stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, stage: str) -> None:
        """The time since the last call was this stage's."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now
