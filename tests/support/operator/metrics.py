"""A run whose metrics can be scraped: the real service and ledger of a job, in real time and with faults, and the real
/metrics of its workers. Only what stands behind them (pods, coordinator, ranks) is made up."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from pretrain_agent.network.metrics_server import WorkerMetrics, serve_http
from pretrain_api.checkpoint.lineage import Rollback, manifest_key
from pretrain_api.messages.reports import (
    Diverged,
    Evaluated,
    MemoryUse,
    Progress,
    ReportBody,
    Restored,
    RolledBack,
    Saved,
    SaveFailed,
)
from pretrain_operator.job.service import JobService
from pretrain_operator.metrics.registry import CONTENT_TYPE, OperatorMetrics
from support.operator.world import FakeChannel, FakeCluster, World, a_job, a_save, a_start, a_step

WORKERS = 2
STAGES = {"copy": 0.01, "upload": 0.2, "agree": 0.01, "commit": 0.02}


@dataclass
class ScrapedRun:
    """Where to scrape, and what to do next. Its own thread does it: ask from any other."""

    operator_port: int = 0
    worker_ports: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    """Set: faults may begin."""
    error: BaseException | None = None


@contextmanager
def a_scraped_run() -> Iterator[ScrapedRun]:
    """A job that trains until the end of the block; from `go` on a worker is lost every second."""
    run, ready, stop = ScrapedRun(), threading.Event(), threading.Event()

    def work() -> None:
        try:
            asyncio.run(_live(run, ready, stop))
        except BaseException as error:
            run.error = error
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ready.wait(60)
        yield run
    finally:
        stop.set()
        thread.join()
    if run.error is not None:
        raise run.error


async def _live(run: ScrapedRun, ready: threading.Event, stop: threading.Event) -> None:
    metrics = OperatorMetrics()
    metrics.leading(True)
    metrics.watch_agents(lambda: WORKERS)
    metrics.watch_queue(lambda: 1, lambda: 0.01)
    workers = [WorkerMetrics() for _ in range(WORKERS)]
    runners = [await serve_http("127.0.0.1", 0, worker, lambda: True) for worker in workers]
    runners.append(await _serve_operator(metrics))
    *run.worker_ports, run.operator_port = [runner.addresses[0][1] for runner in runners]

    world = World(a_job(WORKERS), now=time.time())
    cluster, channel = FakeCluster(world), _Channel(world)
    service = asyncio.create_task(JobService(cluster, channel, metrics.job("ml", "gpt2"), time.time).run())
    ready.set()
    try:
        await _train(run, stop, _Cast(world, cluster, channel, metrics, workers))
    finally:
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
        for runner in runners:
            await runner.cleanup()


async def _serve_operator(metrics: OperatorMetrics) -> web.AppRunner:
    async def show(_: web.Request) -> web.Response:
        body = await asyncio.to_thread(metrics.exposition)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    application = web.Application()
    application.router.add_get("/metrics", show)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


class _Channel(FakeChannel):
    """Restores what was saved last."""

    saved: Saved | None = None
    rolled_to = 0
    """Number taken by the last rollback."""

    def say(self, body: ReportBody, slot: int = 0) -> None:
        if isinstance(body, Saved):
            self.saved = body
        if isinstance(body, Restored) and self.saved is not None:
            body = body.model_copy(update={"step": self.saved.step, "checkpoint": self.saved.checkpoint})
        super().say(body, slot)


@dataclass(frozen=True)
class _Cast:
    world: World
    cluster: FakeCluster
    channel: _Channel
    metrics: OperatorMetrics
    workers: list[WorkerMetrics]

    @property
    def lineage_number(self) -> int:
        """Number under which checkpoints are committed."""
        return max(self.channel.rolled_to, self.world.number)

    def stir(self) -> None:
        """The next thing happens in the world; a generation that is new starts its ranks."""
        before = self.world.number
        self.world.now = time.time()
        self.channel.go_on()
        self.cluster.tell()
        self.channel.changed()
        if self.world.number != before:
            self.start_ranks()

    def start_ranks(self) -> None:
        for number, worker in enumerate(self.workers):
            worker.connected.set(1)
            worker.generation.set(self.world.number)
            worker.restarts.labels("WorkerLost").inc()
            worker.rank_started(0, os.getpid())
            self.channel.say(a_start(number), number)
        self.workers[0].record(0, Restored(step=0, seconds={"verify": 0.1, "load": 0.2}))

    def step(self, step: int) -> None:
        """Both workers do a step."""
        self.world.step = step
        memory = MemoryUse(bytes=2**29, peak_bytes=2**30, reserved_bytes=2**31, alloc_retries=step)
        own: dict[str, Any] = {"data_seconds": 0.001, "compute_seconds": 0.03, "loss_contribution": 5.0 / step}
        own["memory"] = memory
        done = a_step(step, seconds=0.05, stall=0.001).model_copy(update={**own, "mfu": 0.4})
        self.workers[0].record(0, done)
        self.workers[1].record(0, Progress(step=step, seconds=0.05, **own))
        self.channel.say(done)

    def extras(self, step: int) -> None:
        """What comes with a step now and then."""
        self.metrics.api_call("patch", "200")
        self.metrics.agent_refused("TokenExpired")
        if step % 5 == 0:
            saved = a_save(step, self.lineage_number).model_copy(update={"stages": STAGES, "bytes": 2**20})
            assert isinstance(saved, Saved)
            self.workers[0].record(0, saved)
            self.channel.say(saved)
            self.channel.say(SaveFailed(step=step, message="no space left"))
            evaluated = Evaluated(step=step, losses={"held-out": 4.0}, metrics={"endings/right": 0.5}, seconds=0.01)
            self.channel.say(evaluated)

    def divergence(self, step: int) -> None:
        """Drop the update of a step whose loss is not finite, then roll back a spike."""
        self.world.step = step
        self.channel.say(Diverged(step=step, since=step, cause="LossNotFinite", action="Drop"))
        self.channel.say(Diverged(step=step, since=step - 4, cause="LossSpike", action="Rollback"))
        self.channel.say(self.rolled_back(step))

    def rolled_back(self, step: int) -> RolledBack:
        """Take the next number, and lose no step, so that the steps of this run rise."""
        back = Rollback(
            generation=1000 + step, job_uid="uid", cause="LossSpike", step=step + 1, since=step - 3, to_step=step
        )
        checkpoint = manifest_key(self.lineage_number, step)
        self.channel.rolled_to = back.generation
        return RolledBack(number=back.generation, rollback=back, checkpoint=checkpoint)


async def _train(run: ScrapedRun, stop: threading.Event, cast: _Cast) -> None:
    step, lost_at = 0, 0.0
    while not stop.is_set():
        cast.stir()
        if cast.world.generation is not None:
            step = max(step, cast.world.step) + 1
            if run.go.is_set() and step % 20 == 0:
                cast.divergence(step)
            else:
                cast.step(step)
            cast.extras(step)
            if run.go.is_set() and time.monotonic() - lost_at > 1:
                lost_at = time.monotonic()
                cast.world.kill(1)
        await asyncio.sleep(0.05)
