"""Keeps torch from asking DNS for the names of addresses.

It does so, only for its log, in every process that opens a connection to a store, and in the store's own thread for
each that comes in. Where the DNS server is away, on a lost node perhaps, that holds up each recovery by 10 s. torch has
no switch for it, but gives up for good in a process once DNS did not answer at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from datetime import timedelta

UNNAMED_ADDRESS = "127.0.0.2"
"""An address of every machine's loopback which no list of hosts gives a name to."""
SECONDS = timedelta(seconds=2)


def ask_for_no_names() -> None:
    """Have torch ask once, in a thread in which DNS never answers. Takes 2 ms; to be called while nothing else runs.

    Without glibc, or with a torch that never asks, it does nothing.
    """
    asking = threading.Thread(target=_ask_without_dns)
    with _muted():
        asking.start()
        asking.join()


def _ask_without_dns() -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with contextlib.suppress(AttributeError, RuntimeError):
        _give_up_dns_in_this_thread()
        TCPStore(UNNAMED_ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=SECONDS)


def _give_up_dns_in_this_thread() -> None:
    """Set this thread's `_res.retry` of resolv.h to 0: the resolver fails before it sends anything."""
    libc = ctypes.CDLL(None)
    locate, initialise = libc.__res_state, libc.__res_init  # AttributeError: another libc
    locate.restype = ctypes.POINTER(ctypes.c_int)
    initialise()
    locate()[1] = 0  # struct __res_state { int retrans; int retry; …


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """torch warns that it got no name."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
