"""Durations of recoveries, each incident counted once."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain_api.status.job import Incident
from pretrain_operator.metrics.families import RECOVERY_PHASES

_Key = tuple[str, int | None, int, float]


def phase_seconds(incident: Incident) -> dict[str, float]:
    """Return the duration of each phase of a recovery; a phase whose end is unknown is part of the next.

    The phases add up to the time from the fault to the first step.
    """
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


class ResolvedIncidents:
    """Incidents of a job that were resolved since the operator started."""

    def __init__(self) -> None:
        self._known: set[_Key] = set()

    def new(self, incidents: Iterable[Incident]) -> tuple[Incident, ...]:
        """Return those resolved since the last call, oldest first."""
        found = tuple(item for item in incidents if item.resumed_seconds is not None and _key(item) not in self._known)
        self._known.update(map(_key, found))
        return found


def _key(incident: Incident) -> _Key:
    return incident.cause, incident.worker, incident.step, incident.time
