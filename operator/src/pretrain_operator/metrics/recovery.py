"""What recoveries took, each incident counted once."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain_api.status.job import Incident
from pretrain_operator.metrics.families import RECOVERY_PHASES

_Key = tuple[str, int | None, int, float]


def phase_seconds(incident: Incident) -> dict[str, float]:
    """The duration of each phase of a recovery; they add up to the time from the fault to the first step. One whose end
    is not known is part of the next."""
    ends = (
        incident.detected_seconds,
        incident.reformed_seconds,
        incident.restarted_seconds,
        incident.restored_seconds,
        incident.resumed_seconds,
    )
    seconds: dict[str, float] = {}
    before = 0.0
    for phase, end in zip(RECOVERY_PHASES, ends, strict=True):
        if end is not None:
            seconds[phase] = max(0.0, end - before)
            before = max(before, end)
    return seconds


class OvercomeIncidents:
    """Which incidents of a job were overcome since the operator began."""

    def __init__(self) -> None:
        self._known: set[_Key] = set()

    def new(self, incidents: Iterable[Incident]) -> tuple[Incident, ...]:
        """Those that were overcome since the last call, oldest first."""
        found = tuple(item for item in incidents if item.resumed_seconds is not None and _key(item) not in self._known)
        self._known.update(map(_key, found))
        return found


def _key(incident: Incident) -> _Key:
    return incident.cause, incident.worker, incident.step, incident.time
