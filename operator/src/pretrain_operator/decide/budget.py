"""Delays before the next attempt to start a pod."""

from __future__ import annotations

FIRST_DELAY = 1.0
"""Seconds before the third pod of a slot whose first two never joined; the delay doubles with each further one."""
LONGEST_DELAY = 300.0
LONGEST_REFUSAL = 15.0
"""Seconds between two attempts while the cluster refuses pods: the longest time to notice that the cause is fixed."""


def delay_after(failures: int) -> float:
    """Seconds to wait after so many pods of a slot in a row ended before they joined."""
    if failures <= 1:
        return 0.0
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 2, 16))


def delay_after_refusals(times: int) -> float:
    """Seconds to wait after the cluster refused a pod so many times in a row."""
    return min(LONGEST_REFUSAL, FIRST_DELAY * 2.0 ** min(times - 1, 16))
