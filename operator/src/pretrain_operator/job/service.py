"""The service of one job: observe, plan, act, write the status once, then emit Events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Cluster, Event, PodRefused, Snapshot
from pretrain_operator.coordinator.types import Want
from pretrain_operator.decide.actions import Action, CreatePod, DeleteJob, DeletePod, EndAgents
from pretrain_operator.decide.lifecycle import EndReason
from pretrain_operator.decide.observe import (
    FINAL_PHASES,
    Observed,
    PodRefusal,
    ServiceMemory,
    observe,
    observed_facts,
    remember,
)
from pretrain_operator.decide.plan import Decision, plan
from pretrain_operator.decide.pod_history import Identity
from pretrain_operator.decide.status import compose, status_events, urgent_part
from pretrain_operator.facts.fact import CoordinatorFact, Fact, GenerationAdopted, JobEnded, Reported
from pretrain_operator.job.ports import CoordinatorPort, JobListener
from pretrain_operator.job.wakeup import ActionRunner, ReconcileTrigger, cluster_retries
from pretrain_operator.liveness.timings import TIMINGS
from pretrain_operator.projections.generations import GENERATIONS
from pretrain_operator.projections.ledger import Ledger

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Reconciliation:
    """The result of one observation: what remains to be done and written."""

    decision: Decision
    actions: tuple[Action, ...]
    """Actions of the decision that are still to be done."""
    status: JobStatus
    over: bool
    """The job has ended, no worker is left, and nothing more happens."""
    spec_generation: int
    """metadata.generation of the observed job."""


class JobService:
    """Reconciles one job until its end. `run` is the loop; `decide` and `act` are its halves.

    Decisions continue while actions are in progress, so that the loss of a pod reaches the coordinator however slow the
    cluster is.
    """

    def __init__(
        self,
        cluster: Cluster,
        coordinator: CoordinatorPort,
        listener: JobListener,
        clock: Callable[[], float],
        progress_seconds: float = PROGRESS_SECONDS,
    ) -> None:
        """`progress_seconds`: interval of status writes for progress alone."""
        self._cluster = cluster
        self._coordinator = coordinator
        self._listener = listener
        self._clock = clock
        self._progress_seconds = progress_seconds
        self._trigger = ReconcileTrigger()
        self._ledger: Ledger | None = None
        self._snapshot: Snapshot | None = None
        self._memory = ServiceMemory()
        self._created: dict[Identity, tuple[int, frozenset[str]]] = {}
        """metadata.generation of the job, and the nodes that the pod excludes."""
        self._job_deleted = False
        self._written_at = float("-inf")
        self._want: Want | None = None
        self._agents_ended: EndReason | None = None
        self._early: list[CoordinatorFact] = []
        self._events: deque[Event] = deque()
        self._last_error = ""
        coordinator.on_facts(self.receive)
        coordinator.on_change(self._trigger.soon)
        cluster.subscribe(self._trigger.now)

    async def run(self) -> JobStatus:
        """Reconcile until the job has ended and its status is written; returns the last status."""
        retries, runner = cluster_retries(), ActionRunner(done=self._trigger.soon)
        try:
            while True:
                try:
                    reconciliation = await self.decide()
                except OSError:  # the cluster does not answer
                    await asyncio.sleep(retries.delay())
                    self._interrupted()
                    continue
                retries.succeeded()
                backoff = runner.backoff()
                if self._job_deleted:
                    return self._memory.written
                if not backoff and self.is_due(reconciliation):
                    runner.start(self.act(reconciliation))
                    backoff = runner.backoff()
                elif not backoff and reconciliation.over:
                    return self._memory.written
                await self._sleep(self._next_decision(reconciliation, backoff))
        finally:
            await runner.stop()

    async def decide(self) -> Reconciliation:
        """Observe, plan, and update the coordinator. Raises OSError when the cluster does not answer."""
        self._record_created()  # before the snapshot, which may miss pods that are created during the request
        snapshot = await self._cluster.snapshot()
        now = self._clock()
        ledger = self._ledger_for(snapshot)
        observed = self._observe(snapshot, ledger, now)
        decision = plan(snapshot.job, observed, now)
        if decision.want != self._want:
            self._want = decision.want
            self._coordinator.set_want(decision.want)
        phase = decision.verdict.phase
        if phase in FINAL_PHASES:
            self._record(JobEnded(now, failed=phase == "Failed"), ledger, snapshot.job.spec.recovery)
        status = compose(snapshot.job, ledger.status(), decision.verdict, observed, now)
        self._listener.reconciled(status, self._clock() - now)
        over = self._is_over(snapshot, decision)
        return Reconciliation(decision, self._pending(decision), status, over, snapshot.job.metadata.generation)

    async def act(self, reconciliation: Reconciliation) -> bool:
        """Perform the actions, write the status if it is due, emit Events.

        Returns False if something failed and must be retried; independent parts are done all the same.
        """
        errors = await self._perform_all(reconciliation)
        if self._job_deleted:
            return True
        try:
            if self._write_due(reconciliation):
                before = self._memory.written
                await self._cluster.write_status(reconciliation.status)
                self._memory = replace(self._memory, written=reconciliation.status)
                self._written_at = self._clock()
                self._events.extend(status_events(before, reconciliation.status))
            while self._events:
                await self._cluster.emit(self._events[0])
                self._events.popleft()
        except OSError as error:
            errors.append(error)
        self._report_error(errors)
        return not errors

    def is_due(self, reconciliation: Reconciliation) -> bool:
        """Return whether there is something to do."""
        return bool(reconciliation.actions) or self._write_due(reconciliation) or bool(self._events)

    def receive(self, facts: tuple[CoordinatorFact, ...]) -> None:
        """Record facts synchronously: reports are acknowledged when this returns.

        Completed steps that change nothing else trigger a reconcile only when the status may be written.
        """
        if self._ledger is None or self._snapshot is None:
            self._early.extend(facts)
            return
        ledger, recovery = self._ledger, self._snapshot.job.spec.recovery
        state, events = ledger.view().state, len(self._events)
        for fact in facts:
            if isinstance(fact, Reported) and not ledger.slice(GENERATIONS).knows(fact.generation):
                current = self._coordinator.view().current
                if current is not None and current.number == fact.generation:
                    self._record(GenerationAdopted(fact.time, current), ledger, recovery)
            self._record(fact, ledger, recovery)
        routine = ledger.view().state == state and len(self._events) == events
        self._trigger.within(self._progress_seconds if routine else 0.0)

    def _ledger_for(self, snapshot: Snapshot) -> Ledger:
        """Return the ledger, restored from the first snapshot's status: later this service is its only writer."""
        self._snapshot = snapshot
        if self._ledger is None:
            self._memory = ServiceMemory.of(snapshot.status, self._clock())
            self._ledger = Ledger(snapshot.status)
            self._listener.began(snapshot.status)
            early, self._early = tuple(self._early), []
            self.receive(early)
        return self._ledger

    def _observe(self, snapshot: Snapshot, ledger: Ledger, now: float) -> Observed:
        view, before = self._coordinator.view(), self._memory
        self._memory = remember(before, snapshot, view, now)
        for fact in observed_facts(before, self._memory, snapshot, view, now):
            self._record(fact, ledger, snapshot.job.spec.recovery)
        return observe(snapshot, view, self._memory, ledger.view(), now)

    def _record(self, fact: Fact, ledger: Ledger, recovery: Recovery) -> None:
        """Fold a fact into the ledger and pass its effects on."""
        effects = ledger.record(fact, recovery)
        self._events.extend(effects.events)
        for record in effects.steps:
            self._listener.step(record)
        for evaluation in effects.evaluations:
            self._listener.evaluation(evaluation)
        if effects.measurements:
            self._listener.measured(effects.measurements)

    def _record_created(self) -> None:
        history = self._memory.history
        for (slot, attempt), (spec_generation, kept_from) in self._created.items():
            history = history.created(slot, attempt, spec_generation, kept_from)
        self._created.clear()
        self._memory = replace(self._memory, history=history)

    def _is_over(self, snapshot: Snapshot, decision: Decision) -> bool:
        """Return whether nothing more happens. A job with a TTL is served until it is deleted."""
        phase = decision.verdict.phase
        if phase in FINAL_PHASES and snapshot.job.spec.ttl_after_finished is not None:
            return False
        final = phase in FINAL_PHASES or (snapshot.stopping and phase == "Suspended")
        return final and self._memory.written.phase == phase and not any(pod.alive for pod in snapshot.pods)

    def _pending(self, decision: Decision) -> tuple[Action, ...]:
        """Return the actions, without a shutdown of agents that was sent: the coordinator repeats it to late agents."""
        if decision.verdict.end is None:
            self._agents_ended = None
        return tuple(
            action
            for action in decision.actions
            if not (isinstance(action, EndAgents) and action.reason == self._agents_ended)
        )

    def _write_due(self, reconciliation: Reconciliation) -> bool:
        status, written = reconciliation.status, self._memory.written
        if status == written:
            return False
        return urgent_part(status) != urgent_part(written) or reconciliation.over or self._progress_wait() <= 0

    def _progress_wait(self) -> float:
        return self._written_at + self._progress_seconds - self._clock()

    def _next_decision(self, reconciliation: Reconciliation, backoff: float) -> float | None:
        """Seconds until the next decision is due without any trigger; None: none is due."""
        requeue_after = reconciliation.decision.requeue_after
        waits = [] if requeue_after is None else [requeue_after]
        if backoff == float("inf"):
            pass
        elif backoff > 0:
            waits.append(backoff)
        elif reconciliation.status != self._memory.written:
            waits.append(self._progress_wait())
        return max(0.0, min(waits)) if waits else None

    async def _sleep(self, seconds: float | None) -> None:
        """Wait for the next trigger; a late wake-up counts as an interruption of this operator."""
        due = self._clock() + (float("inf") if seconds is None else seconds)
        await self._trigger.wait(seconds)
        clock = self._memory.clock.overslept(due, self._clock(), TIMINGS.late_after)
        self._memory = replace(self._memory, clock=clock)

    def _interrupted(self) -> None:
        self._memory = replace(self._memory, clock=self._memory.clock.interrupted(self._clock()))

    async def _perform_all(self, reconciliation: Reconciliation) -> list[OSError]:
        """Perform the actions in order; returns the errors.

        A refused pod ends the creation of pods: a refusal is an answer, not an error, and the plan schedules the retry.
        """
        errors: list[OSError] = []
        refused = False
        for action in reconciliation.actions:
            if refused and isinstance(action, CreatePod):
                continue
            try:
                await self._perform(action, reconciliation.spec_generation)
            except PodRefused as error:
                refused = True
                refusal = PodRefusal.after(self._memory.refusal, error.reason, error.message, self._clock())
                self._memory = replace(self._memory, refusal=refusal)
            except OSError as error:
                errors.append(error)
        return errors

    async def _perform(self, action: Action, spec_generation: int) -> None:
        match action:
            case CreatePod(slot, attempt, placement):
                await self._cluster.create_pod(slot, attempt, placement)
                self._created[slot, attempt] = (spec_generation, placement.never)
                self._memory = replace(self._memory, refusal=None)
            case DeletePod(pod, grace_seconds):
                await self._cluster.delete_pod(pod, grace_seconds)
            case EndAgents(reason, message):
                await self._coordinator.end(reason, message)
                self._agents_ended = reason
            case DeleteJob():
                await self._cluster.delete_job()
                self._job_deleted = True

    def _report_error(self, errors: list[OSError]) -> None:
        """Emit an Event for an error, once per series of the same error."""
        error = str(errors[0]) if errors else ""
        if error and error != self._last_error:
            self._events.append(Event("Warning", "ClusterError", error))
        self._last_error = error
