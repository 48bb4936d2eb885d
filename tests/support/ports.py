"""TCP ports for servers that must be told theirs.

Not those that a kernel gives out: between the look and the use such a port can become that of an outgoing connection,
and a server that comes back at its port can find it taken.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

RANGE = range(12_000, 30_000)
"""Below what kernels give to outgoing connections (Linux: from 32768) and what Kubernetes gives to services."""

_ports = itertools.cycle(RANGE)
for _ in range(random.Random(os.getpid()).randrange(len(RANGE))):  # two test processes seldom ask for the same ones
    next(_ports)


def free_port() -> int:
    """A port that nobody uses now, and that this process did not give before."""
    for port in itertools.islice(_ports, len(RANGE)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise OSError(f"no free port in {RANGE}")
