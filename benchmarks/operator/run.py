"""The operator against a real API server without kubelets: creating, looking, idling, starting again.

    python benchmarks/operator/run.py [--jobs 63,125,250] [--workers 8] [--idle 60] [--restarts 3] [--profile FOLDER]

Jobs are created up to each of the sizes in turn (each with as many pods as workers, which stay Pending), then the
operator is ended and started again `--restarts` times. With the last size all jobs idle for `--idle` seconds. CPU time,
memory and metrics are those of the operator's process; writes are counted by the API server itself, so that none is
missed. What creates the jobs runs at a lower priority than the operator.
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.status import Status
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from figures import Line, samples
from harness import ROOT, machine
from process import Figures, Operator, Start, until_still

from pretrain_operator.kubernetes.client.api import JOBS, PODS, Object, Resource
from support.kubernetes.api_server import ApiServer, connected, started_api_server
from support.tools import API_SERVER, find

EXAMPLE = ROOT / "examples" / "pretrainjob.yaml"
NAMESPACE = "benchmark"
WRITES = ("POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION")
OURS = ("pretrainjobs", "pods", "configmaps", "networkpolicies", "events")
"""What the operator writes, but for its Lease."""
STILL_SECONDS = 6.0
"""With no write for so long the operator has done what it had to."""


@dataclass(frozen=True)
class Creation:
    """More jobs were created, up to this size."""

    jobs: int
    pods: int
    new_jobs: int
    new_pods: int
    accepted_seconds: float
    """From the first `create` to the last answer."""
    seconds: float
    """From the first `create` to the last pod."""
    cpu_seconds: float
    """Of the operator, until it had nothing more to do."""
    api_server_cpu_seconds: float
    """Of the API server and etcd, in the same time."""
    rss_bytes: int
    looks: float
    p50: float
    p99: float
    calls: dict[str, float]
    """For a job, by verb, as the operator counts them: with its Lease's and the lists of all jobs."""
    writes: dict[str, float]
    """For a job, by verb and resource, as the API server counts them, but for the benchmark's own."""


@dataclass(frozen=True)
class Idle:
    """Nothing happened for a while."""

    jobs: int
    seconds: float
    cpu_share: float
    rss_bytes: int
    looks: float
    p50: float
    p99: float
    calls: dict[str, float]
    writes: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=sizes, default=(63, 125, 250), help="sizes, comma-separated")
    parser.add_argument("--workers", type=int, default=8, help="pods of a job")
    parser.add_argument("--idle", type=float, default=60, help="seconds")
    parser.add_argument("--restarts", type=int, default=3, help="of the operator at each size")
    parser.add_argument("--profile", type=Path, help="folder for cProfile's files; slows the operator down")
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
    """An API server with one operator at a time."""

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
        """Creations, and starts by number of jobs."""
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
        """Let all jobs be."""
        self._status.update(f"{self._jobs} idle jobs: {seconds:.0f} s")
        self._settle()
        writes, before = self._writes(), self._operator.figures()
        began, cpu = time.monotonic(), self._operator.cpu_seconds()  # asking for metrics took CPU time
        time.sleep(seconds)
        share = (self._operator.cpu_seconds() - cpu) / (time.monotonic() - began)
        after = since(self._operator.figures(), before)
        return Idle(
            jobs=self._jobs,
            seconds=seconds,
            cpu_share=share,
            rss_bytes=after.rss_bytes,
            looks=after.looks.count,
            p50=after.looks.quantile(0.5),
            p99=after.looks.quantile(0.99),
            calls=after.calls,
            writes=dict(self._writes() - writes),
        )

    def close(self) -> None:
        """End the operator."""
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
            looks=after.looks.count,
            p50=after.looks.quantile(0.5),
            p99=after.looks.quantile(0.99),
            calls={verb: count / new for verb, count in sorted(after.calls.items())},
            writes={what: count / new for what, count in sorted(made.items()) if count},
        )

    def _job(self, number: int) -> Object:
        """The example's, under a name of its own."""
        job: Object = json.loads(self._example)
        job["metadata"] = {"name": f"job-{number}"}
        job["spec"]["workers"] |= {"replicas": self._workers, "elastic": {"min": 1, "max": self._workers}}
        return job

    def _settle(self) -> None:
        until_still(lambda: self._writes().total(), STILL_SECONDS)
        self._operator.rests()

    def _api_server_cpu(self) -> float:
        total = 0.0
        for pid in self._server.plane.processes:
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
        return total

    def _writes(self) -> Counter[str]:
        """All since the API server was started, by verb and resource."""
        counted: Counter[str] = Counter()
        for labels, value in samples(self._server.kubectl("get", "--raw", "/metrics"), "apiserver_request_total"):
            if labels["verb"] in WRITES and labels["resource"] in OURS:
                what = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                counted[f"{labels['verb']} {what}"] += int(value)
        return counted


def since(after: Figures, before: Figures) -> Figures:
    """What was done in between; the memory as it is."""
    calls = {verb: count - before.calls.get(verb, 0) for verb, count in after.calls.items()}
    return replace(
        after,
        cpu_seconds=after.cpu_seconds - before.cpu_seconds,
        looks=after.looks.since(before.looks),
        calls={verb: count for verb, count in calls.items() if count},
    )


@contextlib.contextmanager
def lower_priority() -> Iterator[ThreadPoolExecutor]:
    """A thread that leaves the processor to the operator: on Linux a thread has a nice value of its own."""
    with ThreadPoolExecutor(1, initializer=partial(os.nice, 10)) as thread:
        yield thread


async def create_jobs(kubeconfig: Path, jobs: list[Object], pods: int) -> tuple[float, float]:
    """Seconds until all jobs were accepted, and until there were so many pods in all."""
    async with connected(kubeconfig, concurrency=16) as api:
        began = time.monotonic()
        await asyncio.gather(*(api.create(JOBS, NAMESPACE, job) for job in jobs))
        accepted = time.monotonic() - began
        while await how_many(api, PODS) < pods:
            await asyncio.sleep(0.2)
        return accepted, time.monotonic() - began


async def how_many(api: Any, resource: Resource) -> int:
    """Objects there are, without reading them."""
    page = await api.read(f"{resource.path(NAMESPACE)}?limit=1")
    return len(page["items"]) + page["metadata"].get("remainingItemCount", 0)


def show(creations: list[Creation], starts: dict[int, list[Start]], idle: Idle, load: tuple[float, ...]) -> None:
    """The tables for people, then one line of JSON."""
    console = Console(width=130)
    created = Table(title="Creating jobs, each size from the one before")
    for column in (
        "jobs",
        "pods",
        "pods/s",
        "accepted s",
        "all pods s",
        "look p50 ms",
        "p99 ms",
        "looks/job",
        "CPU s",
        "API server's",
        "RSS MB",
    ):
        created.add_column(column, justify="right")
    for row in creations:
        created.add_row(
            str(row.jobs), str(row.pods), f"{row.new_pods / row.seconds:.0f}", f"{row.accepted_seconds:.1f}",
            f"{row.seconds:.1f}", f"{row.p50 * 1e3:.2f}", f"{row.p99 * 1e3:.2f}", f"{row.looks / row.new_jobs:.1f}",
            f"{row.cpu_seconds:.1f}", f"{row.api_server_cpu_seconds:.1f}", f"{row.rss_bytes / 1e6:.0f}",
        )  # fmt: skip
    console.print(created)
    last = creations[-1]
    console.print("Calls for a job:", counts(last.calls), "\nWrites for a job:", counts(last.writes))
    started = Table(title="Starting again")
    for column in ("jobs", "pods", "seconds", "CPU seconds"):
        started.add_column(column, justify="right")
    for row in creations:
        of_size = starts.get(row.jobs, [])
        started.add_row(
            str(row.jobs), str(row.pods), " ".join(f"{start.seconds:.2f}" for start in of_size),
            " ".join(f"{start.cpu_seconds:.2f}" for start in of_size),
        )  # fmt: skip
    console.print(started)
    lines = fitted(creations, starts)
    for name, line in lines.items():
        console.print(
            f"{name}: {line.intercept:.2f} + {line.slope * 1e3:.2f} for 1,000 pods, no point off by more than "
            f"{line.residual:.2f}"
        )
    console.print(
        f"{idle.jobs} idle jobs, {idle.seconds:.0f} s: {idle.cpu_share:.2%} of a core, "
        f"{sum(idle.writes.values()):.0f} writes, {idle.looks:.0f} looks (p50 {idle.p50 * 1e3:.2f} ms, "
        f"p99 {idle.p99 * 1e3:.2f} ms), {idle.rss_bytes / 1e6:.0f} MB; calls: {counts(idle.calls)}"
    )
    print(
        json.dumps(
            {
                "benchmark": "operator",
                "creations": [asdict(creation) for creation in creations],
                "starts": {size: [asdict(start) for start in of_size] for size, of_size in starts.items()},
                "startLines": {name: asdict(line) for name, line in lines.items()},
                "idle": asdict(idle),
                "loadBefore": [round(part, 2) for part in load],
                "machine": machine(),
            }
        )
    )


def counts(of: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:.2f}".removesuffix(".00") for name, count in of.items()) or "none"


def fitted(creations: list[Creation], starts: dict[int, list[Start]]) -> dict[str, Line]:
    """Seconds of a start over the number of pods, through every start that was measured."""
    if len(creations) < 2 or not starts:
        return {}
    points = [(row.pods, start) for row in creations for start in starts[row.jobs]]
    pods = [count for count, _ in points]
    return {
        "seconds": Line.through(pods, [start.seconds for _, start in points]),
        "CPU seconds": Line.through(pods, [start.cpu_seconds for _, start in points]),
    }


if __name__ == "__main__":
    main()
