"""Init duties of a container's first process: reap orphans and forward signals.

Without them an agent that is process 1 ignores a SIGTERM during its start, cannot be killed from inside its container,
and accumulates the zombies of killed ranks.
"""

from __future__ import annotations

import os
import signal

FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2})
_AWAITED = FORWARDED | {signal.SIGCHLD}


def leave_init_behind() -> None:
    """Continue in a child if this is process 1, which stays as init and exits as the child does.

    Must be called before threads are started.
    """
    if os.getpid() != 1:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)  # pending until sigwait takes them
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_serve_as_init(child))


def _serve_as_init(child: int) -> int:
    """Serve as init until the child ends and return its exit code as a shell reports it."""
    while True:
        number = signal.sigwait(_AWAITED)
        if number != signal.SIGCHLD:
            os.kill(child, number)
        elif (code := _reap(child)) is not None:
            return code if code >= 0 else 128 - code


def _reap(child: int) -> int | None:
    """Reap all ended processes; return the exit code of the child if it is one of them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            return None
