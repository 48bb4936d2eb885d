"""Exponential backoff with jitter: the one retry schedule of all packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Delays between retries: `first` seconds, each `factor` times the one before, at most `most`.

    `jitter` is the share of a delay that is random, so that clients that met the same error do not retry together:
    1 is full jitter (uniform between 0 and the delay), 0 is none, for schedules that several processes must agree on.
    """

    first: float
    factor: float
    most: float
    jitter: float

    def __post_init__(self) -> None:
        if not (0 < self.first <= self.most and self.factor >= 1 and 0 <= self.jitter <= 1):
            raise ValueError(f"a backoff needs 0 < first <= most, factor >= 1 and 0 <= jitter <= 1: {self}")

    def longest(self, attempt: int) -> float:
        """Return the delay in seconds after the failure of this attempt, counted from 1, before jitter."""
        try:
            return min(self.most, self.first * self.factor ** (max(attempt, 1) - 1))
        except OverflowError:
            return self.most

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Return the delay in seconds after the failure of this attempt; `random` draws from [0, 1)."""
        return self.longest(attempt) * (1 - self.jitter * random()) if self.jitter else self.longest(attempt)


class Retries:
    """Count of consecutive errors, and the delay before the next retry."""

    def __init__(self, backoff: Backoff, random: Callable[[], float]) -> None:
        self._backoff = backoff
        self._random = random
        self.errors = 0
        """Errors since the last success."""

    def succeeded(self) -> None:
        """Reset the count."""
        self.errors = 0

    def delay(self, at_least: float | None = None) -> float:
        """Count an error; return the seconds to wait before the next attempt, `at_least` what the server asked for."""
        self.errors += 1
        return max(at_least or 0.0, self._backoff.delay(self.errors, self._random))
