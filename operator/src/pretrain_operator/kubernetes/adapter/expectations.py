"""Creations and deletions of pods that the informer does not show yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pretrain_operator.kubernetes.client.api import Object

OVERDUE_SECONDS = 5.0
"""Age from which an expected pod is looked up at the API server."""


@dataclass(frozen=True)
class _Created:
    pod: Object
    since: float


class Expectations:
    """Own writes that are ahead of the informer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._created: dict[str, _Created] = {}
        self._deleted: set[str] = set()

    def created(self, pod: Object) -> None:
        """Record a pod that the API server created."""
        self._created[pod["metadata"]["name"]] = _Created(pod, self._clock())

    def gone(self, name: str) -> None:
        """Record that the API server has no such pod."""
        self._created.pop(name, None)

    def deleted(self, pod: Object) -> None:
        """Record an accepted deletion, which is final."""
        self._deleted.add(pod["metadata"]["uid"])

    def get(self, name: str) -> Object | None:
        """Return the expected pod of this name, or None."""
        expected = self._created.get(name)
        return expected.pod if expected is not None else None

    def corrected(self, shown: Iterable[Object]) -> list[Object]:
        """Return the pods of the informer and the expected ones."""
        pods = {pod["metadata"]["name"]: pod for pod in shown}
        for name in self._created.keys() & pods.keys():
            del self._created[name]
        pods |= {name: expected.pod for name, expected in self._created.items()}
        self._deleted &= {pod["metadata"]["uid"] for pod in pods.values()}
        return list(pods.values())

    def is_deleting(self, pod: Object) -> bool:
        """Tell whether the deletion of this pod was accepted."""
        return pod["metadata"]["uid"] in self._deleted

    def overdue(self) -> tuple[Object, ...]:
        """Return the expected pods that the informer should show by now."""
        latest = self._clock() - OVERDUE_SECONDS
        return tuple(expected.pod for expected in self._created.values() if expected.since <= latest)
