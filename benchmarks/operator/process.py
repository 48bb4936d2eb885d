"""Operator process observed from outside: CPU time, memory and metrics."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from figures import Histogram, samples

from pretrain_operator.metrics.families import API_CALLS, RECONCILE

QUIET_SECONDS = 0.5
QUIET_SHARE = 0.2
"""An operator below this share of a core for QUIET_SECONDS is idle."""
START_SECONDS = 180.0


@dataclass(frozen=True)
class Figures:
    """Counters of an operator since its start."""

    cpu_seconds: float
    rss_bytes: int
    reconciles: Histogram
    calls: dict[str, float]
    """API calls by verb, as the operator counts them."""


@dataclass(frozen=True)
class Start:
    """Cost of a start, until every job is reconciled and the operator is idle."""

    seconds: float
    cpu_seconds: float


class Operator:
    """Operator process, stopped by SIGTERM so that it releases its Lease."""

    def __init__(self, kubeconfig: Path, log: Path, profile: Path | None = None) -> None:
        """Start the operator; with `profile` under cProfile, which slows it down."""
        self._log = log
        self._metrics_port = free_port()
        profiler = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable, *profiler, "-m", "pretrain_operator.kubernetes", f"--kubeconfig={kubeconfig}",
                    "--coordinator-host=127.0.0.1", "--listen=127.0.0.1", "--agents-port=0",
                    f"--metrics-port={self._metrics_port}", f"--probe-port={free_port()}", "--lease-seconds=60",
                ],
                stdout=output, stderr=output,
            )  # fmt: skip
        self._seen = psutil.Process(self._process.pid)
        self._began = time.monotonic()

    def started(self, jobs: int) -> Start:
        """Wait until it has reconciled `jobs` jobs and is idle; reads metrics only while idle, to save CPU."""
        while True:
            at, cpu = self.wait_idle()
            try:
                if self.figures().reconciles.count >= jobs:
                    return Start(at - self._began, cpu)
            except OSError:  # it does not listen yet
                pass
            if time.monotonic() > self._began + START_SECONDS:
                sys.exit(
                    f"the operator has not reconciled {jobs} jobs within {START_SECONDS:.0f} s: {self._last_words()}"
                )

    def wait_idle(self) -> tuple[float, float]:
        """Wait until the operator is idle; return since when, and its CPU time at that moment."""
        seen = [(time.monotonic(), self.cpu_seconds())]
        while True:
            time.sleep(0.02)
            now, cpu = time.monotonic(), self.cpu_seconds()
            seen.append((now, cpu))
            while seen[1][0] <= now - QUIET_SECONDS:
                seen.pop(0)
            at, before = seen[0]
            if at <= now - QUIET_SECONDS and cpu - before < QUIET_SHARE * QUIET_SECONDS:
                return at, before

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads."""
        try:
            times = self._seen.cpu_times()
        except psutil.Error:
            sys.exit(f"the operator ended: {self._last_words()}")
        return times.user + times.system

    def figures(self) -> Figures:
        """Read its counters. Raises OSError until it listens."""
        cpu, rss = self.cpu_seconds(), self._seen.memory_info().rss
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        calls: dict[str, float] = {}
        for labels, value in samples(text, API_CALLS.name):
            calls[labels["verb"]] = calls.get(labels["verb"], 0.0) + value
        return Figures(cpu, rss, Histogram.of(text, RECONCILE.name), calls)

    def end(self) -> None:
        """Stop it by SIGTERM, or by SIGKILL after 30 s."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def free_port() -> int:
    """Return a free TCP port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until_still(count: Callable[[], float], seconds: float) -> float:
    """Wait until a count is unchanged for `seconds`; return the time of its last change."""
    last, since = count(), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(seconds / 3)
        if (now := count()) != last:
            last, since = now, time.monotonic()
    return since
