"""Benchmark of the operator against a real API server without kubelets: creation, reconciliation, idling, restarts.

    python benchmarks/operator/run.py [--jobs 63,125,250] [--workers 8] [--idle 60] [--restarts 3] [--profile FOLDER]

Jobs are created up to each size in turn (their pods stay Pending), then the operator is restarted `--restarts` times.
At the last size all jobs idle for `--idle` seconds. CPU time, memory and metrics are those of the operator's process;
the API server counts the writes. The process that creates jobs runs at a lower priority than the operator.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.status import Status

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from figures import samples
from harness import ROOT
from process import Figures, Operator, Start, until_still
from tables import Creation, Idle, show

from pretrain_operator.kubernetes.client.api import JOBS, PODS, Object, Resource
from support.kubernetes.api_server import ApiServer, connected, started_api_server
from support.tools import API_SERVER, find

EXAMPLE = ROOT / "examples" / "pretrainjob.yaml"
NAMESPACE = "benchmark"
WRITES = ("POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION")
OURS = ("pretrainjobs", "pods", "configmaps", "networkpolicies", "events")
"""Resources that the operator writes, except its Lease."""
STILL_SECONDS = 6.0
"""Time without a write after which the operator is done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=sizes, default=(63, 125, 250), help="sizes, comma-separated")
    parser.add_argument("--workers", type=int, default=8, help="pods per job")
    parser.add_argument("--idle", type=float, default=60, help="seconds")
    parser.add_argument("--restarts", type=int, default=3, help="restarts of the operator at each size")
    parser.add_argument("--profile", type=Path, help="folder for cProfile output; slows the operator down")
    arguments = parser.parse_args()
    if find(API_SERVER) is None:
        sys.exit(API_SERVER.reason)
    load_before = os.getloadavg()
    with (
        Console(stderr=True).status("an API server") as status,
        tempfile.TemporaryDirectory() as temporary,
        started_api_server() as server,
    ):
        bench = Bench(server, Path(temporary) / "operator.log", arguments.profile, arguments.workers, status)
        try:
            creations, starts = bench.grow(arguments.jobs, arguments.restarts)
            idle = bench.idle(arguments.idle)
        finally:
            bench.close()
    show(creations, starts, idle, load_before)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",")}))


class Bench:
    """API server with one operator at a time."""

    def __init__(self, server: ApiServer, log: Path, profile: Path | None, workers: int, status: Status) -> None:
        self._server = server
        self._log = log
        self._profile = profile
        self._workers = workers
        self._status = status
        self._jobs = 0
        self._example = server.kubectl("create", "--dry-run=client", "--output=json", f"--filename={EXAMPLE}")
        self._processes = 0
        server.kubectl("create", "namespace", NAMESPACE)
        self._operator = self._start()
        self._operator.started(0)

    def grow(self, sizes: tuple[int, ...], restarts: int) -> tuple[list[Creation], dict[int, list[Start]]]:
        """Create jobs and restart the operator; return creations, and starts by number of jobs."""
        creations: list[Creation] = []
        starts: dict[int, list[Start]] = {}
        for size in sizes:
            self._status.update(f"{self._jobs} -> {size} jobs of {self._workers} pods")
            creations.append(self._create(size))
            for number in range(restarts):
                self._status.update(f"{size} jobs: start {number + 1} of {restarts}")
                self._operator.end()
                self._operator = self._start()
                starts.setdefault(size, []).append(self._operator.started(size))
        return creations, starts

    def idle(self, seconds: float) -> Idle:
        """Measure the cost of idle jobs."""
        self._status.update(f"{self._jobs} idle jobs: {seconds:.0f} s")
        self._settle()
        writes, before = self._writes(), self._operator.figures()
        began, cpu = time.monotonic(), self._operator.cpu_seconds()  # reading metrics took CPU time
        time.sleep(seconds)
        share = (self._operator.cpu_seconds() - cpu) / (time.monotonic() - began)
        after = since(self._operator.figures(), before)
        return Idle(
            jobs=self._jobs,
            seconds=seconds,
            cpu_share=share,
            rss_bytes=after.rss_bytes,
            looks=after.reconciles.count,
            p50=after.reconciles.quantile(0.5),
            p99=after.reconciles.quantile(0.99),
            calls=after.calls,
            writes=dict(self._writes() - writes),
        )

    def close(self) -> None:
        """Stop the operator."""
        self._operator.end()

    def _start(self) -> Operator:
        self._processes += 1
        profile = None if self._profile is None else self._profile / f"{self._processes}.prof"
        return Operator(self._server.kubeconfig, self._log, profile)

    def _create(self, size: int) -> Creation:
        first, self._jobs = self._jobs, size
        new, pods = size - first, size * self._workers
        writes, before, api_server = self._writes(), self._operator.figures(), self._api_server_cpu()
        with lower_priority() as load:
            jobs = [self._job(number) for number in range(first, size)]
            work = create_jobs(self._server.kubeconfig, jobs, pods)
            accepted, seconds = load.submit(asyncio.run, work).result()
        self._settle()
        after = since(self._operator.figures(), before)
        made = self._writes() - writes
        made["POST pretrainjobs"] -= new
        return Creation(
            jobs=size,
            pods=pods,
            new_jobs=new,
            new_pods=new * self._workers,
            accepted_seconds=accepted,
            seconds=seconds,
            cpu_seconds=after.cpu_seconds,
            api_server_cpu_seconds=self._api_server_cpu() - api_server,
            rss_bytes=after.rss_bytes,
            looks=after.reconciles.count,
            p50=after.reconciles.quantile(0.5),
            p99=after.reconciles.quantile(0.99),
            calls={verb: count / new for verb, count in sorted(after.calls.items())},
            writes={what: count / new for what, count in sorted(made.items()) if count},
        )

    def _job(self, number: int) -> Object:
        """Build a job from the example, with its own name."""
        job: Object = json.loads(self._example)
        job["metadata"] = {"name": f"job-{number}"}
        job["spec"]["workers"] |= {"replicas": self._workers, "elastic": {"min": 1, "max": self._workers}}
        return job

    def _settle(self) -> None:
        until_still(lambda: self._writes().total(), STILL_SECONDS)
        self._operator.wait_idle()

    def _api_server_cpu(self) -> float:
        total = 0.0
        for pid in self._server.plane.processes:
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
        return total

    def _writes(self) -> Counter[str]:
        """Count all writes since the start of the API server, by verb and resource."""
        counted: Counter[str] = Counter()
        for labels, value in samples(self._server.kubectl("get", "--raw", "/metrics"), "apiserver_request_total"):
            if labels["verb"] in WRITES and labels["resource"] in OURS:
                what = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                counted[f"{labels['verb']} {what}"] += int(value)
        return counted


def since(after: Figures, before: Figures) -> Figures:
    """Return the difference of the counters, with the current memory."""
    calls = {verb: count - before.calls.get(verb, 0) for verb, count in after.calls.items()}
    return replace(
        after,
        cpu_seconds=after.cpu_seconds - before.cpu_seconds,
        looks=after.reconciles.since(before.reconciles),
        calls={verb: count for verb, count in calls.items() if count},
    )


@contextlib.contextmanager
def lower_priority() -> Iterator[ThreadPoolExecutor]:
    """Provide a thread of lower priority than the operator: on Linux each thread has its own nice value."""
    with ThreadPoolExecutor(1, initializer=partial(os.nice, 10)) as thread:
        yield thread


async def create_jobs(kubeconfig: Path, jobs: list[Object], pods: int) -> tuple[float, float]:
    """Create jobs; return the seconds until all are accepted, and until there are `pods` pods in total."""
    async with connected(kubeconfig, concurrency=16) as api:
        began = time.monotonic()
        await asyncio.gather(*(api.create(JOBS, NAMESPACE, job) for job in jobs))
        accepted = time.monotonic() - began
        while await count_objects(api, PODS) < pods:
            await asyncio.sleep(0.2)
        return accepted, time.monotonic() - began


async def count_objects(api: Any, resource: Resource) -> int:
    """Count objects without reading them."""
    page = await api.read(f"{resource.path(NAMESPACE)}?limit=1")
    return len(page["items"]) + page["metadata"].get("remainingItemCount", 0)


if __name__ == "__main__":
    main()
