"""Runs a command that dies with the process that started it: `python tether.py PARENT_PID COMMAND…`.

A script of its own, started without site-packages (10 ms): a function run between fork and exec could deadlock in a
parent that has threads. The parent-death signal outlives exec. Systems without it run the command untied.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tether(parent: int) -> None:
    """Have this process killed when its parent dies; ends at once if that happened already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def command(arguments: list[str]) -> list[str]:
    """The command line that runs `arguments` tied to this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *arguments]


if __name__ == "__main__":
    tether(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
