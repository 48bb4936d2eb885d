"""Pace of a job: seconds per step, from the reports of completed steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

WINDOW = 50
"""Steps over which the mean is taken: enough to smooth, few enough to follow a change of workers."""
DURATIONS = 20
"""Steps over which the median is taken."""


@dataclass(frozen=True)
class StepPace:
    """Two measures of the last steps: the mean from step to step, which includes pauses, and the median duration."""

    times: tuple[tuple[int, float], ...] = ()
    """(step, unix seconds at which it completed), oldest first."""
    durations: tuple[float, ...] = ()
    known_mean: float | None = None
    """Mean measured by an earlier process; holds until two steps are known."""

    def stepped(self, step: int, time: float, seconds: float) -> StepPace:
        """Add a step that took `seconds` and completed at `time`. Steps that it repeats are forgotten."""
        kept = tuple(known for known in self.times if known[0] < step)
        return replace(self.lasted(seconds), times=(*kept, (step, time))[-WINDOW:])

    def lasted(self, seconds: float) -> StepPace:
        """Add only the duration of a step, for the median."""
        return replace(self, durations=(*self.durations, seconds)[-DURATIONS:])

    @property
    def stepped_at(self) -> float | None:
        """Unix seconds of the last step; None before the first."""
        return self.times[-1][1] if self.times else None

    @property
    def mean_seconds(self) -> float | None:
        """Seconds per step with pauses for recovery; None as long as nothing is known."""
        if len(self.times) < 2:
            return self.known_mean
        (first_step, first), (last_step, last) = self.times[0], self.times[-1]
        return round((last - first) / (last_step - first_step), 6)

    @property
    def median_seconds(self) -> float:
        """Typical duration of a step without pauses; 0 before the first."""
        return median(self.durations) if self.durations else 0.0
