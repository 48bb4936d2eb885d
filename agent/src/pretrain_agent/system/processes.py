"""Handles of the ranks' processes, and Linux's parent-death signal."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable

AGENT_PID_VARIABLE = "PRETRAIN_AGENT_PID"
_PR_SET_PDEATHSIG = 1


class RunningRanks:
    """The running ranks, by pidfds, which never refer to another process. All methods are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pidfds: list[int] = []

    def replace(self, pids: Iterable[int]) -> None:
        """Track these processes instead of the earlier ones."""
        with self._lock:
            for pidfd in self._pidfds:
                os.close(pidfd)
            self._pidfds = [pidfd for pid in pids if (pidfd := _open(pid)) is not None]

    def kill(self) -> None:
        """SIGKILL all ranks; ranks that are gone already are no error."""
        with self._lock:
            for pidfd in self._pidfds:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def die_with_parent(parent_pid: int) -> None:
    """Have this process SIGKILLed when the thread that started it ends; exit now if it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # The parent died between the fork and the call above.
        os._exit(1)


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
