"""Run a command that dies with its parent: `python parent_death.py PARENT_PID COMMAND…`.

A script of its own, started without site-packages (10 ms): a function run between fork and exec could deadlock in a
threaded parent. The parent-death signal survives exec. Systems without it run the command without it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Request SIGKILL for this process when its parent dies; exit at once if it is dead already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def command(arguments: list[str]) -> list[str]:
    """Return the command line that runs `arguments` as a process that dies with this one."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *arguments]


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
