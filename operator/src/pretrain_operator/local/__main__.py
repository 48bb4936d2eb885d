"""The operator process of a local run: `python -m pretrain_operator.local CONTROL_FD AGENTS_FD EPOCH`.

Reconcile loop and coordinator over processes. The supervisor starts it and restarts it when it dies; all of its state
can be rebuilt from the supervisor and the agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

from aiohttp import web

from pretrain_operator.coordinator.authentication import anybody
from pretrain_operator.coordinator.server import AgentServer, steady_clock
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from pretrain_operator.local.cluster import LocalCluster


async def serve(control: socket.socket, agents: socket.socket, epoch: int) -> None:
    """Serve the one job until it has ended. Raises ConnectionError when the supervisor is gone."""
    cluster = await LocalCluster.connect(control)
    first = await cluster.snapshot()
    clock = steady_clock()
    # The socket is on the loopback, and the job's uid in the URL is random.
    server = AgentServer(anybody, clock)
    channel = server.open(first.status.job_uid, epoch=epoch, highest_number=first.status.generation)
    listener = JobListener(step=cluster.record_step, evaluation=cluster.record_evaluation)
    service = JobService(cluster, channel, listener, clock)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, agents).start()
    listening = asyncio.create_task(cluster.run())
    serving = asyncio.create_task(service.run())
    try:
        done, _ = await asyncio.wait((listening, serving), return_when=asyncio.FIRST_COMPLETED)
        if serving not in done:
            raise ConnectionError("the supervisor is gone")
        await serving
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await cluster.close()
        await runner.cleanup()


def main() -> None:
    """Run on the descriptors that the supervisor passed."""
    control, agents, epoch = (int(argument) for argument in sys.argv[1:4])
    with socket.socket(fileno=control) as channel, socket.socket(fileno=agents) as listener:
        asyncio.run(serve(channel, listener, epoch))


if __name__ == "__main__":
    main()
