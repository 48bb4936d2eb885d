"""Points in time of an incident, where the status has seconds since the fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pretrain_api.status.job import Incident
from pretrain_operator.cluster import InjectedFault
from pretrain_operator.facts.log import CHECKPOINT_CORRUPT, DIVERGENCES

SAME_WORKER_SECONDS = 120.0
"""Longest time from an injected fault to the end of a generation by the same worker: silence is noticed late."""
OTHER_WORKER_SECONDS = 5.0
"""Longest time if another worker noticed first: a broken collective is noticed within moments."""
GRACEFUL_FAULTS = ("add:", "remove:", "term:")
"""Prefixes of injected faults that lead to no incident when everything works."""


@dataclass(frozen=True)
class IncidentTimes:
    """An incident; times are unix seconds, None if not reached."""

    cause: str
    worker: int | None
    node: str
    step: int
    fault: float
    detected: float | None = None
    reformed: float | None = None
    restarted: float | None = None
    restored: float | None = None
    resumed: float | None = None
    steps_lost: int | None = None
    action: str = ""
    message: str = ""
    generation: int | None = None
    """Newest generation that is to resolve it."""

    @property
    def open(self) -> bool:
        """Training has not resumed."""
        return self.resumed is None and self.action != "Failed"


def shown(item: IncidentTimes) -> Incident:
    """Convert to the form of the status."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(max(0.0, moment - item.fault), 6)

    return Incident(
        cause=item.cause,
        worker=item.worker,
        node=item.node,
        step=item.step,
        time=item.fault,
        detected_seconds=since(item.detected),
        reformed_seconds=since(item.reformed),
        restarted_seconds=since(item.restarted),
        restored_seconds=since(item.restored),
        resumed_seconds=since(item.resumed),
        steps_lost=item.steps_lost,
        action=item.action,
        message=item.message,
    )


def read(incident: Incident) -> IncidentTimes:
    """Convert from the form of the status."""

    def at(seconds: float | None) -> float | None:
        return None if seconds is None else incident.time + seconds

    return IncidentTimes(
        cause=incident.cause,
        worker=incident.worker,
        node=incident.node,
        step=incident.step,
        fault=incident.time,
        detected=at(incident.detected_seconds),
        reformed=at(incident.reformed_seconds),
        restarted=at(incident.restarted_seconds),
        restored=at(incident.restored_seconds),
        resumed=at(incident.resumed_seconds),
        steps_lost=incident.steps_lost,
        action=incident.action,
        message=incident.message,
    )


def explain(items: Iterable[IncidentTimes], faults: tuple[InjectedFault, ...]) -> tuple[IncidentTimes, ...]:
    """Replace the time of each incident that an injected fault explains; a fault explains one incident only."""
    explained = list(items)
    taken = {item.fault for item in explained}
    unused = [
        fault
        for fault in faults
        if fault.slot is not None and not fault.description.startswith(GRACEFUL_FAULTS) and fault.time not in taken
    ]
    injected = {fault.time for fault in faults}
    for index, item in enumerate(explained):
        if item.fault in injected or item.cause in (CHECKPOINT_CORRUPT, *DIVERGENCES):
            continue
        if (fault := _closest(item, unused)) is not None:
            unused.remove(fault)
            explained[index] = replace(item, fault=fault.time)
    return tuple(explained)


def _closest(item: IncidentTimes, faults: Iterable[InjectedFault]) -> InjectedFault | None:
    """Find the latest fault of the same worker before the incident was detected, else of another one just before."""
    detected = item.fault if item.detected is None else item.detected
    ages = [(detected - fault.time, fault) for fault in faults if fault.time <= detected]
    same = [(age, fault) for age, fault in ages if fault.slot == item.worker and age <= SAME_WORKER_SECONDS]
    other = [(age, fault) for age, fault in ages if age <= OTHER_WORKER_SECONDS]
    return min(same or other, key=lambda aged: aged[0])[1] if same or other else None
