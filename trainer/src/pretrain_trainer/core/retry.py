"""Waiting for what somebody must mend outside: said once, looked at again and again, and then gone on from.

All ranks wait in rounds: in each of them every rank looks for itself, all agree whether anything is in the way, and all
pause for the same time. So no collective lasts longer than one look, whatever the outage, and nobody's timeout passes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TypeVar

from pretrain_api.messages.reports import Blocked, Unblocked
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import DataDelayed, Obstacle

Result = TypeVar("Result")

_PAUSES = (1.0, 2.0, 4.0, 8.0, 10.0)
"""Seconds between looks; the last one for ever."""
MESSAGE_LENGTH = 2000


class Waiting:
    """What the ranks of one process group do when something is in the way. Rank 0 says so for all."""

    def __init__(self, link: AgentLink, speaks: bool, collectives: Collectives, sleep: Callable[[float], None]) -> None:
        self._link = link
        self._speaks = speaks
        self._collectives = collectives
        self._sleep = sleep

    def until_clear(self, act: Callable[[], Result]) -> Result:
        """What `act` returns once no Obstacle is raised any more; it must raise them on all ranks alike."""
        said: Blocked | None = None
        for attempt in count():
            try:
                result = act()
            except Obstacle as obstacle:
                said = self._say(obstacle, said)
                if not isinstance(obstacle, DataDelayed):
                    self._sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            else:
                if said is not None and self._speaks:
                    self._link.report(Unblocked())
                return result
        raise AssertionError("counting never ends")

    def together(self, act: Callable[[], Result]) -> Result:
        """What `act` returns, which each rank does for itself, once it raises an Obstacle on none of them. Collective.

        Until then it is done again on all ranks, by those too that could.
        """
        return self.until_clear(lambda: self._agreed(act))

    def _agreed(self, act: Callable[[], Result]) -> Result:
        own: Obstacle | None = None
        result: Result | None = None
        try:
            result = act()
        except Obstacle as obstacle:
            own = obstacle
        if not self._collectives.all_reduce_max(0 if own is None else 1):
            return result  # type: ignore[return-value]  # act returned it
        said = self._collectives.all_gather_object(None if own is None else (type(own), str(own)))
        found = [item for item in said if item is not None]
        kind, message = min(found, key=lambda item: item[0] is DataDelayed)  # what must be mended is said first
        raise kind(message) from own

    def _say(self, obstacle: Obstacle, said: Blocked | None) -> Blocked:
        blocked = Blocked(reason=obstacle.reason, message=str(obstacle)[:MESSAGE_LENGTH])
        if blocked != said and self._speaks:
            self._link.report(blocked)
        return blocked
