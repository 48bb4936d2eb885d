"""What a container's first process owes the others: it reaps orphans and passes signals on.

Without this an agent that is process 1 would ignore a SIGTERM that comes while it starts, could not be killed from
inside its container, and would collect what killed ranks leave behind.
"""

from __future__ import annotations

import os
import signal

FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2})
_AWAITED = FORWARDED | {signal.SIGCHLD}


def leave_init_behind() -> None:
    """If this is process 1, go on in a child of it; process 1 stays, and ends as that child ends.

    To be called before there are threads.
    """
    if os.getpid() != 1:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)  # kept, until somebody waits for them
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_accompany(child))


def _accompany(child: int) -> int:
    """Serve as init until the child ends; its exit code, as a shell would tell it."""
    while True:
        number = signal.sigwait(_AWAITED)
        if number != signal.SIGCHLD:
            os.kill(child, number)
        elif (code := _reap(child)) is not None:
            return code if code >= 0 else 128 - code


def _reap(child: int) -> int | None:
    """Wait for all that have ended; the exit code of the child if it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            return None
