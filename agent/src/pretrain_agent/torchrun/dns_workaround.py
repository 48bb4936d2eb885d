"""Workaround that stops torch from resolving addresses to names.

torch does a reverse look-up, only for its log, in every process that connects to a TCPStore and in the store's thread
for each incoming connection. Without a DNS server, perhaps on the lost node, that delays each recovery by 10 s. torch
has no option for it, but stops for good in a process after one look-up that gets no answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from datetime import timedelta

UNNAMED_ADDRESS = "127.0.0.2"
"""Loopback address that no hosts file names."""
SECONDS = timedelta(seconds=2)


def disable_reverse_dns() -> None:
    """Have torch do one look-up in a thread in which DNS never answers. Takes 2 ms; call it while nothing else runs.

    Does nothing without glibc, or with a torch that does no look-ups.
    """
    lookup = threading.Thread(target=_connect_without_dns)
    with _muted():
        lookup.start()
        lookup.join()


def _connect_without_dns() -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with contextlib.suppress(AttributeError, RuntimeError):
        _disable_dns_in_this_thread()
        TCPStore(UNNAMED_ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=SECONDS)


def _disable_dns_in_this_thread() -> None:
    """Set this thread's `_res.retry` (resolv.h) to 0, so that the resolver fails before it sends anything."""
    libc = ctypes.CDLL(None)
    locate, initialise = libc.__res_state, libc.__res_init  # AttributeError: another libc
    locate.restype = ctypes.POINTER(ctypes.c_int)
    initialise()
    locate()[1] = 0  # struct __res_state { int retrans; int retry; …


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Silence stderr: torch warns about the missing name."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
