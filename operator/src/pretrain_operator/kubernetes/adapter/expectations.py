"""Pods that were created, and deletions that were accepted, before the informer tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pretrain_operator.kubernetes.client.api import Object

OVERDUE_SECONDS = 5.0
"""After which a pod that the informer has not shown is asked about."""


@dataclass(frozen=True)
class _Created:
    pod: Object
    since: float


class Expectations:
    """What this process knows of its own pods better than the informer does."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._created: dict[str, _Created] = {}
        self._deleted: set[str] = set()

    def created(self, pod: Object) -> None:
        """The pod exists, as the API server has just said."""
        self._created[pod["metadata"]["name"]] = _Created(pod, self._clock())

    def gone(self, name: str) -> None:
        """The API server has no such pod."""
        self._created.pop(name, None)

    def deleted(self, pod: Object) -> None:
        """The pod's deletion was accepted: nothing takes that back."""
        self._deleted.add(pod["metadata"]["uid"])

    def get(self, name: str) -> Object | None:
        """The pod of this name that the informer has not shown yet."""
        expected = self._created.get(name)
        return expected.pod if expected is not None else None

    def corrected(self, shown: Iterable[Object]) -> list[Object]:
        """The pods that the informer shows, and those that it will."""
        pods = {pod["metadata"]["name"]: pod for pod in shown}
        for name in self._created.keys() & pods.keys():
            del self._created[name]
        pods |= {name: expected.pod for name, expected in self._created.items()}
        self._deleted &= {pod["metadata"]["uid"] for pod in pods.values()}
        return list(pods.values())

    def is_deleting(self, pod: Object) -> bool:
        """Its deletion was accepted."""
        return pod["metadata"]["uid"] in self._deleted

    def overdue(self) -> tuple[Object, ...]:
        """The pods of which the informer should have told by now."""
        latest = self._clock() - OVERDUE_SECONDS
        return tuple(expected.pod for expected in self._created.values() if expected.since <= latest)
