"""Delays before the next pod of a slot."""

from __future__ import annotations

FIRST_DELAY = 1.0
"""Seconds before the third pod of a slot whose first two never joined; doubles with each later one."""
LONGEST_DELAY = 300.0
LONGEST_REFUSAL_DELAY = 15.0
"""Upper bound after refusals: the longest time between a fix, such as a raised quota, and the next attempt."""


def restart_delay(failures: int) -> float:
    """Seconds to wait after this number of consecutive pods of a slot that ended before they joined."""
    if failures <= 1:
        return 0.0
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 2, 16))


def refusal_delay(times: int) -> float:
    """Seconds to wait after this number of consecutive refusals by the cluster."""
    return min(LONGEST_REFUSAL_DELAY, FIRST_DELAY * 2.0 ** min(times - 1, 16))
