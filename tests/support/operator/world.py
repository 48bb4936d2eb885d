"""What tests of the operator are built from: jobs, pods, agents, facts, and a world without processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from typing import Any

from pretrain_api.checkpoint.lineage import Rollback, StepRange, manifest_key
from pretrain_api.messages.protocol import Generation, Member
from pretrain_api.messages.reports import Finished, ReportBody, Restored, RolledBack, Saved, Started, StepDone
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Bookkeeping, JobStatus, SlotMemory
from pretrain_api.status.records import StepRecord
from pretrain_operator.cluster import Event, InjectedFault, Placement, Pod, PodPhase, Snapshot
from pretrain_operator.coordinator.types import AgentView, CoordinatorView, Want
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.pod_history import PodHistory
from pretrain_operator.decide.workers import observed_workers
from pretrain_operator.facts.fact import CoordinatorFact, GenerationAnnounced, GenerationEnded, Reported
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.projections.ledger import Projected

NOON = 1_800_000_000.0
PROJECTED = {field.name for field in fields_of(Projected)}


def a_job(
    replicas: int = 3,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    spares: int = 0,
    suspend: bool = False,
    recovery: dict[str, Any] | None = None,
    ttl: str | None = None,
    generation: int = 0,
    tensor: int = 1,
) -> PretrainJob:
    elastic = {"min": minimum} | ({"max": maximum} if maximum is not None else {})
    return PretrainJob.model_validate(
        {
            "apiVersion": "pretrain.dev/v1alpha1",
            "kind": "PretrainJob",
            "metadata": {"name": "test", "uid": "uid-1", "generation": generation},
            "spec": {
                "suspend": suspend,
                "workers": {"replicas": replicas, "elastic": elastic, "spares": spares},
                "training": {
                    "model": {"preset": "gpt2-tiny"},
                    "data": {"tokenizer": "t.json", "sources": [{"name": "web", "uri": "web"}]},
                    "steps": 100,
                    "parallelism": {"tensor": tensor},
                },
                "checkpoint": {"storage": {"path": "checkpoints"}},
                "recovery": recovery or {},
                "ttlAfterFinished": ttl,
            },
        }
    )


def a_pod(slot: int, attempt: int = 0, phase: PodPhase = "Running", *, deleting: bool = False, **fields: Any) -> Pod:
    return Pod(slot, attempt, phase, **{"node": f"node-{slot}", "deleting": deleting} | fields)


def a_stuck_pod(slot: int, reason: str = "Unschedulable", message: str = "", **fields: Any) -> Pod:
    """One that cannot start."""
    node = "" if reason == "Unschedulable" else f"node-{slot}"
    return a_pod(slot, phase="Pending", **{"reason": reason, "message": message, "node": node} | fields)


def observed(
    job: PretrainJob,
    *pods: Pod,
    view: CoordinatorView | None = None,
    written: JobStatus | None = None,
    heard: dict[tuple[int, int], float] | None = None,
    healthy_since: float = NOON - 3600,
    stopping: bool = False,
    **fields: Any,
) -> Observed:
    """The job at noon. Pods are recorded and their agents have joined unless `written` says otherwise."""
    view = view or a_view()
    written = written or JobStatus(bookkeeping=Bookkeeping(slots=_recorded(*pods)))
    before = replace(PodHistory.of(written), heard=heard or {})
    history = before.advance(Snapshot(job, written, pods, stopping=stopping), view, NOON, running=True)
    workers = observed_workers(pods, view, history, SilenceClock(healthy_since), NOON)
    projected = Projected(**{name: fields.pop(name) for name in PROJECTED & fields.keys()})
    return Observed(
        workers, view, written, history, projected, stopping=stopping, healthy_since=healthy_since, **fields
    )


def _recorded(*pods: Pod) -> tuple[SlotMemory, ...]:
    highest = {pod.slot: max(other.attempt for other in pods if other.slot == pod.slot) for pod in pods}
    return tuple(SlotMemory(slot=slot, attempt=attempt, joined=True) for slot, attempt in highest.items())


def an_agent(slot: int, attempt: int = 0, *, heard: float = NOON, connected: bool = True) -> AgentView:
    return AgentView(
        agent_id=f"agent-{slot}-{attempt}",
        slot=slot,
        attempt=attempt,
        node=f"node-{slot}",
        connected=connected,
        last_heard=heard,
        rank=None,
        step=0,
        leaving=False,
    )


def a_generation(number: int, *members: tuple[int, int], reason: str = "Started", processes: int = 1) -> Generation:
    """Members are (slot, attempt)."""
    return Generation(
        number=number,
        job_uid="uid-1",
        members=tuple(
            Member(
                rank=rank,
                agent_id=f"agent-{slot}-{attempt}",
                slot=slot,
                attempt=attempt,
                host="localhost",
                node=f"node-{slot}",
                processes=processes,
            )
            for rank, (slot, attempt) in enumerate(members)
        ),
        store_host="localhost",
        store_port=1,
        reason=reason,
    )


def a_view(*agents: AgentView, current: Generation | None = None, **fields: Any) -> CoordinatorView:
    number = current.number if current is not None else 0
    values: dict[str, Any] = {"highest_number": number, "forming": False, "holding": False} | fields
    return CoordinatorView(current=current, agents=agents, **values)


def a_step(step: int, *, tokens: int = 0, seconds: float = 1.0, stall: float = 0.0) -> StepDone:
    return StepDone(
        step=step,
        loss=10.0 / step,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=tokens or step * 100,
        tokens_per_second=100.0,
        seconds=seconds,
        stall_seconds=stall,
    )


def said(time: float, generation: int, body: ReportBody, slot: int = 0) -> Reported:
    return Reported(NOON + time, generation, slot, body)


def a_restore(step: int, generation: int = 1) -> Restored:
    return Restored(step=step, checkpoint=manifest_key(generation, step) if step else None, parameters=7)


def a_save(step: int, generation: int = 1) -> Saved:
    return Saved(step=step, checkpoint=manifest_key(generation, step), bytes=1, stall_seconds=0.25, seconds=1.0)


def a_rolled_back(number: int, to_step: int = 3, step: int = 9, count: int = 1) -> RolledBack:
    """What ranks say that went back from generation 1 under this number."""
    skipped = StepRange(first=step - 2, last=step + 7)
    rollback = Rollback(
        generation=number, job_uid="uid", cause="LossSpike", step=step, since=step - 1, to_step=to_step, skipped=skipped
    )
    checkpoint = manifest_key(1, to_step)
    return RolledBack(number=number, rollback=rollback, checkpoint=checkpoint, skipped=(skipped,), count=count)


def a_start(rank: int) -> Started:
    return Started(rank=rank, local_rank=0, pid=100 + rank)


def an_end(time: float, number: int, cause: Any = "WorkerLost", *, step: int = 0, **fields: Any) -> GenerationEnded:
    values: dict[str, Any] = {"fault_time": NOON + time} | fields
    return GenerationEnded(time=NOON + time, number=number, cause=cause, step=step, **values)


def announced(time: float, generation: Generation) -> GenerationAnnounced:
    return GenerationAnnounced(NOON + time, generation)


class Crash(Exception):
    """The operator dies."""


@dataclass
class World:
    """A cluster and a coordinator in memory: pods start when told, agents join, steps are done. It outlives operators.

    `crash_at`: the number of the write that kills the operator, before or after it takes effect.
    """

    job: PretrainJob
    status: JobStatus = field(default_factory=JobStatus)
    now: float = NOON
    crash_at: int | None = None
    crash_after: bool = False
    crashed: bool = False
    pods: dict[tuple[int, int], Pod] = field(default_factory=dict[tuple[int, int], Pod])
    generation: Generation | None = None
    number: int = 0
    holding: bool = False
    step: int = 0
    stopping: bool = False
    deleted: bool = False
    finished: Finished | None = None
    frozen: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    faults: tuple[InjectedFault, ...] = ()
    writes: int = 0
    statuses: list[JobStatus] = field(default_factory=list[JobStatus])
    events: list[Event] = field(default_factory=list[Event])
    created: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    records: list[StepRecord] = field(default_factory=list[StepRecord])

    def clock(self) -> float:
        return self.now

    def alive(self) -> set[tuple[int, int]]:
        return {identity for identity, pod in self.pods.items() if pod.alive}

    def kill(self, slot: int) -> None:
        for identity in self.alive():
            if identity[0] == slot:
                self.pods[identity] = replace(self.pods[identity], phase="Failed", exit_code=-9, reason="Killed")

    def write(self, effect: Callable[[], None]) -> None:
        self.writes += 1
        fatal = self.writes == self.crash_at
        self.crashed |= fatal
        if fatal and not self.crash_after:
            raise Crash
        effect()
        if fatal:
            raise Crash


class FakeCluster:
    """The `Cluster` port on a World."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.changed: list[Callable[[], None]] = []
        self.errors: list[OSError] = []

    async def snapshot(self) -> Snapshot:
        self._fail()
        world = self.world
        pods = tuple(world.pods[identity] for identity in sorted(world.pods))
        return Snapshot(world.job, world.status, pods, world.faults, world.stopping)

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        self._fail()

        def effect() -> None:
            if (slot, attempt) not in self.world.pods:
                self.world.pods[slot, attempt] = a_pod(slot, attempt, "Pending")
                self.world.created.append((slot, attempt))

        self.world.write(effect)

    async def delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        self._fail()

        def effect() -> None:
            identity = (pod.slot, pod.attempt)
            if identity in self.world.pods:
                if grace_seconds == 0 or not self.world.pods[identity].alive:
                    del self.world.pods[identity]
                else:
                    self.world.pods[identity] = replace(self.world.pods[identity], deleting=True)

        self.world.write(effect)

    async def delete_job(self) -> None:
        self._fail()

        def effect() -> None:
            self.world.deleted = True

        self.world.write(effect)

    async def write_status(self, status: JobStatus) -> None:
        self._fail()

        def effect() -> None:
            self.world.status = JobStatus.from_json(status.to_json())
            self.world.statuses.append(status)

        self.world.write(effect)

    async def emit(self, event: Event) -> None:
        self._fail()
        self.world.events.append(event)

    def subscribe(self, changed: Callable[[], None]) -> None:
        self.changed.append(changed)

    def tell(self) -> None:
        for changed in self.changed:
            changed()

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


class FakeChannel:
    """A coordinator without rules of liveness: what is in the world is known at once when it is told to go on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.want: Want | None = None
        self.wants: list[Want] = []
        self.ends: list[str] = []
        self.facts: Callable[[tuple[CoordinatorFact, ...]], None] = lambda _: None
        self.changed: Callable[[], None] = lambda: None

    def set_want(self, want: Want) -> None:
        self.want = want
        self.wants.append(want)

    def on_facts(self, callback: Callable[[tuple[CoordinatorFact, ...]], None]) -> None:
        self.facts = callback

    def on_change(self, callback: Callable[[], None]) -> None:
        self.changed = callback

    async def end(self, reason: str, message: str) -> None:
        def effect() -> None:
            self.ends.append(reason)
            self.world.generation = None
            for identity in self.world.alive():
                self.world.pods[identity] = replace(self.world.pods[identity], phase="Succeeded", exit_code=0)

        self.world.write(effect)

    def view(self) -> CoordinatorView:
        world = self.world
        agents = tuple(
            an_agent(*identity, heard=world.now - 60 if identity in world.frozen else world.now)
            for identity, pod in sorted(world.pods.items())
            if pod.phase == "Running"
        )
        return a_view(
            *agents,
            current=world.generation,
            highest_number=world.number,
            holding=world.holding,
            finished=world.finished,
        )

    def go_on(self) -> bool:
        """Whatever can happen in the world happens; False: nothing did."""
        world, want = self.world, self.want
        for identity, pod in list(world.pods.items()):
            if pod.phase == "Pending":
                world.pods[identity] = replace(pod, phase="Running")
                return True
            if pod.deleting:
                del world.pods[identity]
                return True
        return want is not None and self._train(want)

    def _train(self, want: Want) -> bool:
        world = self.world
        members = {(m.slot, m.attempt) for m in world.generation.members} if world.generation else set()
        joined = {i for i in world.alive() & want.pods if world.pods[i].phase == "Running"} - world.frozen
        chosen = sorted(i for i in joined if i[0] not in want.remove_slots)[: want.replicas]
        if members - joined:
            self.facts(
                (
                    GenerationEnded(
                        world.now, world.number, "WorkerLost", world.step, world.now, min(members - joined)[0]
                    ),
                )
            )
            world.generation = None
            return True
        if world.generation is not None and not want.running and not world.holding:
            world.holding = True
            return True
        if not want.running or world.finished or len(chosen) < want.min:
            return False
        if members == set(chosen):
            return self._step_after_a_crash()
        if world.generation is not None:
            self.facts((GenerationEnded(world.now, world.number, "Resized", world.step, world.now),))
        world.number += 1
        world.step += 1
        world.holding = False
        world.generation = a_generation(world.number, *chosen)
        self.facts((GenerationAnnounced(world.now, world.generation),))
        self.say(a_restore(world.step - 1))
        self.say(a_step(world.step))
        return True

    def _step_after_a_crash(self) -> bool:
        """Training goes on meanwhile: a new operator hears of it even if its predecessor took its last facts along."""
        if not self.world.crashed:
            return False
        self.world.crashed = False
        self.world.step += 1
        self.say(a_step(self.world.step))
        return True

    def say(self, body: ReportBody, slot: int = 0) -> None:
        self.facts((Reported(self.world.now, self.world.number, slot, body),))
