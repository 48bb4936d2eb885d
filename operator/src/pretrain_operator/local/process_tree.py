"""Process trees: a worker is its agent and everything below, whatever sessions they made."""

from __future__ import annotations

import contextlib
import signal

import psutil


def tree_of(pid: int) -> tuple[psutil.Process, ...]:
    """The process and all its descendants, the process first; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return (root, *root.children(recursive=True))
    except psutil.NoSuchProcess:
        return ()


def signal_all(processes: tuple[psutil.Process, ...], number: signal.Signals) -> None:
    """Signal each of them that still is the process it was."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
