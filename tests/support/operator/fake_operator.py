"""An operator process for tests of the supervisor: keeps as many pods as are wanted, replaces failed ones.

`python fake_operator.py CONTROL_FD AGENTS_FD EPOCH`. Ends with 0 once the user stops the run and the pods are gone.
Each process says its epoch as an event, and with `DIE` in the environment it exits by itself after that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from pretrain_api.status.records import EvaluationRecord, EvaluationResult, SampleRecord, StepRecord
from pretrain_operator.cluster import Event, Placement
from pretrain_operator.local.cluster import LocalCluster


async def serve(control: socket.socket, epoch: str) -> None:
    cluster = await LocalCluster.connect(control)
    changed = asyncio.Event()
    cluster.subscribe(changed.set)
    listening = asyncio.create_task(cluster.run())
    await cluster.emit(Event("Normal", "Epoch", epoch))
    if "DIE" in os.environ:
        await cluster.close()
        sys.exit(1)
    while not listening.done():
        changed.clear()
        seen = await cluster.snapshot()
        await cluster.write_status(
            seen.status.model_copy(update={"generation": int(epoch), "replicas": len(seen.pods)})
        )
        cluster.record_step(a_step(int(epoch)))
        for record in evaluations(int(epoch)):
            cluster.record_evaluation(record)
        if seen.stopping and not seen.pods:
            await cluster.close()
            return
        for pod in seen.pods:
            if (seen.stopping or not pod.alive) and not pod.deleting:
                await cluster.delete_pod(pod, 5.0)
        wanted = 0 if seen.stopping else seen.job.spec.workers.replicas
        for slot in range(wanted):
            if not any(pod.slot == slot for pod in seen.pods):
                await cluster.create_pod(slot, int(epoch), Placement())
        await changed.wait()


def a_step(generation: int) -> StepRecord:
    return StepRecord(
        step=1,
        loss=2.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=64,
        tokens_per_second=1000.0,
        generation=generation,
        workers=1,
        time=0.0,
    )


def evaluations(generation: int) -> list[EvaluationResult]:
    place = {"step": 1, "generation": generation, "time": 0.0}
    samples = [SampleRecord(number=number, prompt="a", text="b\u2028c", **place) for number in (0, 1)]
    return [EvaluationRecord(losses={"prose": 2.5}, seconds=0.1, **place), *samples]


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[3]))
