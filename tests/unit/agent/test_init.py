"""Process 1 of a container, in a process namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest

from pretrain_agent.system.init import leave_init_behind

T = TypeVar("T")
needs_namespaces = pytest.mark.usefixtures("namespaces")
PROLOGUE = (
    "import os, signal, sys, time\nfrom pretrain_agent.system.init import leave_init_behind\nleave_init_behind()\n"
)


def container(program: str) -> subprocess.Popen[str]:
    """Run a program as process 1."""
    unshare = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        [*unshare, sys.executable, "-c", PROLOGUE + program],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
    )


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output.strip()


def first(process: subprocess.Popen[str]) -> psutil.Process:
    """Process 1, seen from outside."""
    return eventually(lambda: next(iter(psutil.Process(process.pid).children()), None))


def eventually(look: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + 60
    while (seen := look()) is None:
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
    return seen


@pytest.mark.bare
@needs_namespaces
def test_the_program_runs_below_process_1_which_ends_as_it_does() -> None:
    assert ends(container("print(os.getpid() != 1, os.getppid()); sys.exit(7)")) == (7, "True 1")


@needs_namespaces
def test_a_killed_program_is_told_by_its_signal() -> None:
    assert ends(container("os.kill(os.getpid(), signal.SIGKILL)"))[0] == 128 + signal.SIGKILL


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_program(number: signal.Signals) -> None:
    told = container(
        f"signal.signal({number:d}, lambda number, _: sys.exit(number))\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    assert told.stdout is not None
    assert told.stdout.readline() == "ready\n"

    first(told).send_signal(number)

    assert ends(told)[0] == number


@needs_namespaces
def test_a_program_that_has_no_handler_yet_ends_by_sigterm() -> None:
    starting = container("print('starting', flush=True)\ntime.sleep(60)")
    assert starting.stdout is not None
    starting.stdout.readline()

    first(starting).terminate()

    assert ends(starting)[0] == 128 + signal.SIGTERM


@needs_namespaces
def test_orphans_are_reaped() -> None:
    program = """
if os.fork() == 0:  # A rank that is killed...
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(0.1)
            os._exit(0)  # ... and what it had started, which ends later.
    os.kill(os.getpid(), signal.SIGKILL)
os.wait()
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    left = {name for name in os.listdir('/proc') if name.isdecimal()} - {'1', str(os.getpid())}
    if not left:
        print('none left')
        break
    time.sleep(0.01)
else:
    print('left:', left)
"""
    assert ends(container(program)) == (0, "none left")


def test_elsewhere_nothing_happens() -> None:
    before = os.getpid()

    leave_init_behind()

    assert os.getpid() == before
