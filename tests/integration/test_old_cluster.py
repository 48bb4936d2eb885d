"""A job of a cluster that an operator of old code left in mid-run: a new one takes it over as it is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages.protocol import Generation, Hello
from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, JOBS, LEASES, NETWORK_POLICIES, PODS, Api, Object
from pretrain_operator.kubernetes.server.app import running_operator
from pretrain_operator.kubernetes.workload.names import WorkerPod
from support.kubernetes.app import STEP_SECONDS, SimAgent, Town, Training, a_town, until
from support.worlds.old import OldAgent, cluster_job, lost, old_code

SAVED = 12
"""The step of the job's last checkpoint."""
FORMED = 4
"""The number under which its workers met; by a rollback they took the next one."""
SECONDS = 120.0
"""Processes of agents take some time to start where the machine is busy with other tests."""
MOMENTS = 1_700_000_000
"""Numbers above it are Unix seconds."""


class Survivor(SimAgent):
    """An agent whose ranks have trained on since the old operator ended, after a rollback of theirs."""

    def __init__(self, *arguments: Any, said: Hello) -> None:
        super().__init__(*arguments)
        assert said.generation is not None
        self.id = said.agent_id
        self._said = said
        self._connection._highest_epoch = said.highest_epoch
        self._run(said.generation)

    def hello(self) -> Hello:
        rolled_to = self._said.rolled_to if self._generation == self._said.generation else 0
        return super().hello().model_copy(update={"rolled_to": rolled_to})

    async def _train(self, generation: Generation, rank: int) -> None:
        if generation != self._said.generation:
            await super()._train(generation, rank)
            return
        present = self._training.present.setdefault(generation.number, set())
        present.add(self.id)
        while True:
            await asyncio.sleep(STEP_SECONDS)
            if rank == 0 and len(present) == len(generation.members):
                self._step(generation.number)


@pytest.fixture
async def town(api: Api, namespace: str, apiserver: Path, tmp_path: Path) -> AsyncIterator[Town]:
    async with a_town(api, namespace, apiserver, tmp_path) as town:
        yield town


async def test_a_job_in_mid_run_keeps_its_workers_and_its_history(town: Town) -> None:
    old = await adopt(town)

    async with running_operator(town.options):
        after = await reaches(town, step=town.kubelet.training["gpt2"].step + 10)
        pods = await town.pods()

    before = old["job"]["status"]
    epochs = {message.epoch for agent in town.kubelet.agents.values() for message in agent.heard}
    assert min(epochs) > max(hello["highestEpoch"] for hello in old["hellos"])
    assert [pod["metadata"]["uid"] for pod in pods] == [pod["metadata"]["uid"] for pod in old["created"]]
    assert after["generation"] == before["generation"]
    for part in ("jobUid", "generations", "incidents", "suspects", "skipped", "rollbacks", "checkpoints", "parameters",
                 "latestCheckpoint", "validationLoss", "evaluationMetrics"):  # fmt: skip
        assert not lost(before[part], after[part]), part
    for part in ("slots", "restarts", "lastFailure", "checkpointStep", "saveSeconds"):
        assert not lost(before["bookkeeping"][part], after["bookkeeping"][part]), part
    for state, seconds in before["goodput"]["seconds"].items():
        assert after["goodput"]["seconds"][state] >= seconds, state
    assert after["bookkeeping"]["highestStep"] >= after["step"]


async def test_a_worker_lost_later_is_replaced_by_its_next_attempt_in_a_higher_generation(town: Town) -> None:
    old = await adopt(town)

    async with running_operator(town.options):
        await reaches(town, step=town.kubelet.training["gpt2"].step + 10)
        await town.kubelet.kill(old["created"][1]["metadata"]["name"])
        await until(lambda: replaced(town))
        after = (await town.job())["status"]

    before = old["job"]["status"]
    formed, rolled = len(before["generations"]), len(before["incidents"])
    (number,) = [item["number"] for item in after["generations"][formed:]]
    assert number > before["generation"]
    assert after["generations"][-1]["startedAtStep"] == SAVED
    assert not lost(before["generations"], after["generations"][:formed])
    assert not lost(before["incidents"], after["incidents"][:rolled])
    assert [incident["cause"] for incident in after["incidents"][rolled:]] == ["WorkerLost"]
    assert [(slot["slot"], slot["attempt"]) for slot in after["bookkeeping"]["slots"]] == [(0, 1), (1, 2), (2, 1)]
    assert len(after["bookkeeping"]["restarts"]) == len(before["bookkeeping"]["restarts"]) + 1


async def test_old_agents_train_on_while_one_operator_follows_another(town: Town, tmp_path: Path) -> None:
    code = old_code(tmp_path / "code")
    agents: list[OldAgent] = []

    def make_agent(*arguments: Any) -> Any:
        agents.append(OldAgent(code, tmp_path, *arguments))
        return agents[-1]

    town.kubelet.make_agent = make_agent
    await town.submit(total=1_000_000, workers={"replicas": 2, "elastic": {"min": 2, "max": 2}})
    async with running_operator(town.options):
        before = await until(lambda: trains(town, step=3), SECONDS)

    async with running_operator(town.options):
        after = await until(lambda: trains(town, step=before.step + 100), SECONDS)
        name = (await town.pods())[1]["metadata"]["name"]
        await town.kubelet.kill(name)
        recovered = await until(lambda: trains(town, attempts=[0, 1]), SECONDS)
        await town.change({"suspend": True})
        await town.reaches("Suspended")
        await until(lambda: all(agent.exited.is_set() for agent in agents))

    assert (after.generation, after.incidents) == (before.generation, ())
    assert [(worker.slot, worker.rank) for worker in after.workers] == [
        (worker.slot, worker.rank) for worker in before.workers
    ]
    assert recovered.generation > after.generation
    assert [incident.cause for incident in recovered.incidents] == ["WorkerLost"]
    assert len(agents) == 3
    assert (tmp_path / "saved").exists(), "they took a checkpoint before they were suspended"


async def trains(town: Town, step: int = 1, attempts: Sequence[int] = (0, 0)) -> JobStatus | None:
    """The status, if these attempts of the workers train and have done a step."""
    status = await town.status()
    workers = [(worker.attempt, worker.state) for worker in status.workers]
    return status if status.step >= step and workers == [(attempt, "Training") for attempt in attempts] else None


async def reaches(town: Town, step: int) -> Object:
    """The status, once the job trains and has done a step."""
    await town.reaches("Training", step=step)
    return (await town.job())["status"]


async def replaced(town: Town) -> bool:
    status = await town.status()
    trains = [(worker.attempt, worker.state) for worker in status.workers]
    return trains == [(1, "Training"), (2, "Training"), (1, "Training")] and status.step > SAVED


async def adopt(town: Town) -> dict[str, Any]:
    """Have the old job, all that was made for it and its agents in this API server, as if they had always been there.

    The API server gives uids, so names and references follow; times are as if the old operator had ended just now.
    """
    old = cluster_job()
    kept = {part: old["job"][part] for part in ("apiVersion", "kind", "spec")}
    name, was = old["job"]["metadata"]["name"], old["job"]["metadata"]["uid"]
    job = await town.api.create(JOBS, town.namespace, {**kept, "metadata": {"name": name}})
    uid = job["metadata"]["uid"]
    old = json.loads(json.dumps(old).replace(was, uid).replace(f"{name}-{was[:5]}", f"{name}-{uid[:5]}"))
    ended = old["job"]["status"]["bookkeeping"]["countedUntil"]
    old["job"]["status"] = later(old["job"]["status"], time.time() - ended)
    job["status"] = old["job"]["status"]
    await town.api.replace(JOBS, town.namespace, name, job, subresource="status")
    for resource, items in (
        (CONFIG_MAPS, old["configMaps"]), (NETWORK_POLICIES, old["networkPolicies"]), (LEASES, old["leases"])
    ):  # fmt: skip
        for item in items:
            await town.api.create(resource, town.namespace, recreated(item))
    hellos = {(hello["slot"], hello["attempt"]): Hello.from_json(json.dumps(hello)) for hello in old["hellos"]}
    step = max(hello.step for hello in hellos.values())
    training = town.kubelet.training[name] = Training(until=100_000, total=10_000_000, step=step, saved=SAVED)

    def make_agent(url: str, job_uid: str, worker: WorkerPod, *others: Any) -> SimAgent:
        said = hellos.pop((worker.slot, worker.attempt), None)
        if said is None:
            return SimAgent(url, job_uid, worker, *others)
        return Survivor(url, job_uid, worker, *others, said=said)

    town.kubelet.make_agent = make_agent
    old["created"] = [await town.api.create(PODS, town.namespace, recreated(pod)) for pod in old["pods"]]
    await until(lambda: len(training.present.get(FORMED, ())) == 3)
    return old


def recreated(item: Object) -> Object:
    """An object without what the API server adds."""
    kept = ("name", "labels", "annotations", "ownerReferences")
    metadata = {part: item["metadata"][part] for part in kept if part in item["metadata"]}
    kinds = {part: item[part] for part in ("apiVersion", "kind") if part in item}
    return {
        **kinds,
        "metadata": metadata,
        **{part: item[part] for part in ("spec", "data", "immutable") if part in item},
    }


def later(value: Any, seconds: float) -> Any:
    """A JSON value with all its moments moved."""
    if isinstance(value, dict):
        return {key: later(item, seconds) for key, item in value.items()}
    if isinstance(value, list):
        return [later(item, seconds) for item in value]
    return value + seconds if isinstance(value, int | float) and value > MOMENTS else value
