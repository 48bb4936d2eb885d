"""Ties a process's life to its parent's, by Linux's parent-death signal."""

from __future__ import annotations

import ctypes
import os
import signal

AGENT_PID_VARIABLE = "PRETRAIN_AGENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have this process SIGKILLed when the thread that started it ends; end it now if that has happened already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # It died between the fork and the call above.
        os._exit(1)
