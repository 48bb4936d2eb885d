"""How long to leave an API server alone that does not answer as it should."""

from __future__ import annotations

from collections.abc import Callable

FIRST_SECONDS = 0.2
LAST_SECONDS = 5.0


class Backoff:
    """Delays after errors in a row: each up to twice the one before, at random, so that many clients that met the
    same error do not come back together."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        """Between 0 and 1."""
        self.errors = 0
        """In a row."""

    def succeeded(self) -> None:
        """The next error is the first one again."""
        self.errors = 0

    def delay(self, at_least: float | None = None) -> float:
        """There was an error: seconds to wait before the next try."""
        self.errors += 1
        longest = min(LAST_SECONDS, FIRST_SECONDS * 2.0 ** min(self.errors - 1, 16))
        return max(at_least or 0.0, longest * (0.5 + 0.5 * self._random()))
