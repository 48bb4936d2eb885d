"""The service of one job: it looks, decides, tells the coordinator, acts, writes the status, tells people."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pretrain_api.messages.profile_request import InvalidRequest, ProfileRequest
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_operator.cluster import Cluster, Event, Refused, Snapshot
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.decide.budget import delay_after_refusals
from pretrain_operator.decide.lifecycle import EndReason
from pretrain_operator.decide.observe import History, Identity, Observed, Refusal, Worker, joined_workers, missing_slots
from pretrain_operator.decide.plan import Action, CreatePod, Decision, DeleteJob, DeletePod, EndAgents, plan
from pretrain_operator.decide.replacement import fell_silent, is_alone
from pretrain_operator.decide.status import compose, news, urgent_part
from pretrain_operator.decide.suspects import crashes, silent_nodes
from pretrain_operator.facts.fact import CoordinatorFact, Reported
from pretrain_operator.job.wakeup import Hands, Retries, Wake
from pretrain_operator.projections.ledger import Ledger

PROGRESS_SECONDS = 0.5
FINAL_PHASES = ("Succeeded", "Failed")
LATE_SECONDS = 5.0
"""A service that wakes up so much too late was stopped or starved: the silence of others meanwhile proves nothing."""


class Channel(Protocol):
    """One job's coordinator, as far as it is needed here."""

    def set_want(self, want: Want) -> None:
        """Tell it what is wanted from now on."""
        ...

    def view(self) -> CoordinatorView:
        """The coordinator at this moment."""
        ...

    def on_facts(self, callback: Callable[[tuple[CoordinatorFact, ...]], None]) -> None:
        """Who takes the facts; reports are acknowledged after it returned."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Who is told that the view may have changed."""
        ...

    async def end(self, reason: EndReason, message: str) -> None:
        """Shut all agents down, and those that come later."""
        ...


@dataclass(frozen=True)
class Witness:
    """Who is told what a service hears and does: metrics, the line log of a local run."""

    began: Callable[[JobStatus], None] = lambda _: None
    """A service goes on from this status, as last written."""
    step: Callable[[StepRecord], None] = lambda _: None
    """A step was done."""
    appraisal: Callable[[Appraisal], None] = lambda _: None
    """The model was evaluated, or wrote a text."""
    facts: Callable[[tuple[CoordinatorFact, ...]], None] = lambda _: None
    """The coordinator said so."""
    looked: Callable[[JobStatus, float], None] = lambda status, seconds: None
    """A look came to this status and took so many seconds."""


@dataclass(frozen=True)
class Round:
    """What one look came to."""

    decision: Decision
    actions: tuple[Action, ...]
    """Those of the decision that are still to be done."""
    status: JobStatus
    over: bool
    """The job has ended, no worker is left, and nothing more is to come."""
    spec_generation: int
    """metadata.generation of the job that was decided on."""


class JobService:
    """One job from its first look to its end. `run` is the loop; `look` and `act` are its two halves. Looking goes on
    while things are being done, so that the loss of a pod reaches the coordinator however slow the cluster is."""

    def __init__(
        self,
        cluster: Cluster,
        channel: Channel,
        witness: Witness,
        clock: Callable[[], float],
        progress_seconds: float = PROGRESS_SECONDS,
    ) -> None:
        """`progress_seconds`: between two writes of the status for nothing but progress."""
        self._cluster = cluster
        self._channel = channel
        self._witness = witness
        self._clock = clock
        self._progress_seconds = progress_seconds
        self._wake = Wake()
        self._ledger: Ledger | None = None
        self._snapshot: Snapshot | None = None
        self._history = History()
        self._sound_since = float("-inf")
        self._created: dict[Identity, tuple[int, frozenset[str]]] = {}
        """With metadata.generation of the job and the nodes that the pod is kept from."""
        self._refusal: Refusal | None = None
        self._job_deleted = False
        self._written = JobStatus()
        self._written_at = float("-inf")
        self._want: Want | None = None
        self._let_go: EndReason | None = None
        self._early: list[CoordinatorFact] = []
        self._events: deque[Event] = deque()
        self._complaint = ""
        channel.on_facts(self.take)
        channel.on_change(self._wake.soon)
        cluster.subscribe(self._wake.now)

    async def run(self) -> JobStatus:
        """Serve the job until it has ended and everything about it is written; returns its last status."""
        looks, hands = Retries(), Hands(done=self._wake.soon)
        try:
            while True:
                try:
                    round_ = await self.look()
                except OSError:  # the cluster does not answer
                    await asyncio.sleep(looks.delay())
                    self._sound_since = self._clock()
                    continue
                looks.succeeded()
                rest = hands.rest()
                if self._job_deleted:
                    return self._written
                if not rest and self.owes(round_):
                    hands.start(self.act(round_))
                    rest = hands.rest()
                elif not rest and round_.over:
                    return self._written
                await self._sleep(self._next_look(round_, rest))
        finally:
            await hands.stop()

    async def look(self) -> Round:
        """Observe, decide and tell the coordinator. Raises OSError when the cluster does not answer."""
        for (slot, attempt), (spec_generation, kept_from) in self._created.items():
            self._history = self._history.created(slot, attempt, spec_generation, kept_from)
        self._created.clear()  # those created from here on may be missing in the snapshot
        snapshot = await self._cluster.snapshot()
        now = self._clock()
        ledger = self._ledger_for(snapshot)
        view = self._channel.view()
        workers = self._observe(snapshot, view, ledger, now)
        seen = Observed(
            workers=workers,
            view=view,
            written=self._written,
            history=self._history,
            state=ledger.state,
            recovering=ledger.recovering,
            spent=ledger.spent,
            fatal=ledger.fatal,
            stopping=snapshot.stopping,
            suspects=ledger.suspects,
            refusal=self._refusal,
            ranks_wait=ledger.ranks_wait,
            invalid=snapshot.invalid,
            grace_seconds=ledger.grace_seconds,
            stepped_at=ledger.stepped_at,
            sound_since=self._sound_since,
            profile=self._open_request(snapshot, ledger),
        )
        decision = plan(snapshot.job, seen, now)
        if decision.want != self._want:
            self._want = decision.want
            self._channel.set_want(decision.want)
        phase = decision.verdict.phase
        if phase in FINAL_PHASES:
            ledger.close(now, failed=phase == "Failed")
        status = compose(snapshot.job, ledger.status(), decision.verdict, seen, now)
        final = phase in FINAL_PHASES or (snapshot.stopping and phase == "Suspended")
        self._witness.looked(status, self._clock() - now)
        over = final and self._written.phase == phase and not any(pod.alive for pod in snapshot.pods)
        if phase in FINAL_PHASES and snapshot.job.spec.ttl_after_finished is not None:
            over = False  # It is served until it is deleted.
        return Round(decision, self._still_to_do(decision), status, over, snapshot.job.metadata.generation)

    async def act(self, round_: Round) -> bool:
        """Do what was decided, write the status if that is due, tell people. False: something did not succeed and is
        to be tried again; what did not depend on it was done all the same."""
        errors = await self._perform_all(round_)
        if self._job_deleted:
            return True
        try:
            if self._due(round_):
                before = self._written
                await self._cluster.write_status(round_.status)
                self._written, self._written_at = round_.status, self._clock()
                self._events.extend(news(before, round_.status))
            while self._events:
                await self._cluster.emit(self._events[0])
                self._events.popleft()
        except OSError as error:
            errors.append(error)
        self._complain(errors)
        return not errors

    def owes(self, round_: Round) -> bool:
        """There is something to do."""
        return bool(round_.actions) or self._due(round_) or bool(self._events)

    def take(self, facts: tuple[CoordinatorFact, ...]) -> None:
        """Take in facts, at once: when this returns the reports are acknowledged. For a step that changes nothing else
        the job is looked at when its status may be written."""
        if self._ledger is None or self._snapshot is None:
            self._early.extend(facts)
            return
        self._witness.facts(facts)
        state, events = self._ledger.state, len(self._events)
        for fact in facts:
            if isinstance(fact, Reported) and not self._ledger.knows(fact.generation):
                current = self._channel.view().current
                if current is not None and current.number == fact.generation:
                    self._ledger.adopt(current)
            self._events.extend(self._ledger.record(fact, self._snapshot.job.spec.recovery))
        calm = self._ledger.state == state and len(self._events) == events
        self._wake.within(self._progress_seconds if calm else 0.0)

    def _ledger_for(self, snapshot: Snapshot) -> Ledger:
        """The ledger, made from the status of the first snapshot: later this service is the status' one writer."""
        self._snapshot = snapshot
        if self._ledger is None:
            self._written = snapshot.status
            self._history = History.of(snapshot.status)
            self._sound_since = self._clock()
            if (refused := snapshot.status.bookkeeping.refused) is not None:
                self._refusal = Refusal(refused.reason, refused.message)
            self._ledger = Ledger(snapshot.status, self._witness.step, self._witness.appraisal)
            self._witness.began(snapshot.status)
            early, self._early = tuple(self._early), []
            self.take(early)
        return self._ledger

    def _observe(self, snapshot: Snapshot, view: CoordinatorView, ledger: Ledger, now: float) -> tuple[Worker, ...]:
        """Bring the history and the ledger up to the present."""
        phase = self._written.phase
        running = not (snapshot.stopping or snapshot.job.spec.suspend or phase in (*FINAL_PHASES, "Suspended"))
        before, self._history = self._history, self._history.advance(snapshot, view, now, running=running)
        if failed := self._history.failures_since(before):
            text = "a worker ended before it joined" + _last_words(snapshot, failed[-1])
            ledger.pods_failed(len(failed), now, text, snapshot.job.spec.recovery)
            self._events.append(Event("Warning", "WorkerFailed", text))
        if view.current is not None and not ledger.knows(view.current.number):
            ledger.adopt(view.current)
        pods_run = any(pod.phase == "Running" for pod in snapshot.pods)
        ledger.look(now, pods_run=pods_run, suspended=phase == "Suspended", faults=snapshot.faults)
        workers = joined_workers(snapshot.pods, view, self._history, now, self._sound_since)
        if running:
            alone = is_alone(workers)
            silent = silent_nodes((worker for worker in workers if fell_silent(worker, alone=alone)), workers)
            ledger.nodes(crashes(snapshot.pods), silent, now, snapshot.job.spec.recovery)
        if not missing_slots(snapshot.job, workers):
            self._refusal = None
        return workers

    def _open_request(self, snapshot: Snapshot, ledger: Ledger) -> ProfileRequest | None:
        """The request for a profile, until it is answered; one that is not understood is answered at once."""
        request = snapshot.profile
        if request is None or ledger.answered(request.id):
            return None
        if isinstance(request, InvalidRequest):
            self._events.extend(ledger.profile_failed(request.id, 0, request.message))
            return None
        return request

    def _still_to_do(self, decision: Decision) -> tuple[Action, ...]:
        """The actions without that of letting the agents go, when they were told: those who come later are told too."""
        end = decision.verdict.end
        if end is None:
            self._let_go = None
        return tuple(
            action
            for action in decision.actions
            if not (isinstance(action, EndAgents) and action.reason == self._let_go)
        )

    def _due(self, round_: Round) -> bool:
        """The status must be written now."""
        if round_.status == self._written:
            return False
        urgent = urgent_part(round_.status) != urgent_part(self._written)
        return urgent or round_.over or self._progress_wait() <= 0

    def _progress_wait(self) -> float:
        return self._written_at + self._progress_seconds - self._clock()

    def _next_look(self, round_: Round, rest: float) -> float | None:
        """Seconds after which there is something to do even if nobody says anything."""
        waits = [] if round_.decision.requeue_after is None else [round_.decision.requeue_after]
        if rest == float("inf"):
            pass
        elif rest > 0:
            waits.append(rest)
        elif round_.status != self._written:
            waits.append(self._progress_wait())
        return max(0.0, min(waits)) if waits else None

    async def _sleep(self, seconds: float | None) -> None:
        """Until there is something to do, and notice an oversleeping."""
        due = self._clock() + (float("inf") if seconds is None else seconds)
        await self._wake.wait(seconds)
        if self._clock() > due + LATE_SECONDS:
            self._sound_since = self._clock()

    async def _perform_all(self, round_: Round) -> list[OSError]:
        """Do one thing after the other; returns what did not succeed. Once a pod was refused no other is tried: a
        refusal is no trouble of the cluster but its answer, and the plan knows when to ask again."""
        errors: list[OSError] = []
        refused = False
        for action in round_.actions:
            if refused and isinstance(action, CreatePod):
                continue
            try:
                await self._perform(action, round_.spec_generation)
            except Refused as refusal:
                refused = True
                times = 1 + (self._refusal.times if self._refusal is not None else 0)
                retry_at = self._clock() + delay_after_refusals(times)
                self._refusal = Refusal(refusal.reason, refusal.message, times, retry_at)
            except OSError as error:
                errors.append(error)
        return errors

    async def _perform(self, action: Action, spec_generation: int) -> None:
        match action:
            case CreatePod(slot, attempt, placement):
                await self._cluster.create_pod(slot, attempt, placement)
                self._created[slot, attempt] = (spec_generation, placement.never)
                self._refusal = None
            case DeletePod(pod, grace_seconds):
                await self._cluster.delete_pod(pod, grace_seconds)
            case EndAgents(reason, message):
                await self._channel.end(reason, message)
                self._let_go = reason
            case DeleteJob():
                await self._cluster.delete_job()
                self._job_deleted = True

    def _complain(self, errors: list[OSError]) -> None:
        """Tell people of an error, once however often it comes again in a row."""
        complaint = str(errors[0]) if errors else ""
        if complaint and complaint != self._complaint:
            self._events.append(Event("Warning", "ClusterError", complaint))
        self._complaint = complaint


def _last_words(snapshot: Snapshot, identity: Identity) -> str:
    pod = next((pod for pod in snapshot.pods if (pod.slot, pod.attempt) == identity), None)
    said = (pod.message or pod.reason) if pod is not None else "its pod is gone, or nothing was heard of it and it went"
    return f" (worker {identity[0]}): {said}"
