"""The ranks' processes, by handles that can never mean another process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable


class RunningRanks:
    """The ranks that run now. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pidfds: list[int] = []

    def replace(self, pids: Iterable[int]) -> None:
        """These are the ranks now."""
        with self._lock:
            for pidfd in self._pidfds:
                os.close(pidfd)
            self._pidfds = [pidfd for pid in pids if (pidfd := _open(pid)) is not None]

    def kill(self) -> None:
        """SIGKILL them; that they are gone is success."""
        with self._lock:
            for pidfd in self._pidfds:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
