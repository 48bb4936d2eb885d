"""The facts of a run, in their order, as what people and programs read: progress, incidents, goodput, spending."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pretrain_api.checkpoint.lineage import parse_manifest_key
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import (
    Blocked,
    CheckpointRejected,
    Diverged,
    Evaluated,
    Failed,
    Finished,
    Held,
    Plateau,
    Profiled,
    ProfileFailed,
    Restored,
    Resumed,
    RolledBack,
    Sampled,
    Saved,
    SaveFailed,
    Started,
    StepDone,
    Unblocked,
)
from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import GenerationSummary, GoodputState, JobStatus, NodeFailure, Obstacle, Profile, Suspect
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_operator.cluster import Event, InjectedFault
from pretrain_operator.decide.budget import Spent
from pretrain_operator.decide.suspects import Blame
from pretrain_operator.facts.fact import Announced, CoordinatorFact, Ended, Reported
from pretrain_operator.projections import checkpoints
from pretrain_operator.projections import event_text as events
from pretrain_operator.projections.failure_accounting import Charges
from pretrain_operator.projections.goodput import Timeline
from pretrain_operator.projections.incidents import IncidentLog
from pretrain_operator.projections.records import evaluation_record, sample_record, step_record
from pretrain_operator.projections.throughput import Rhythm

MAX_PROFILES = 5
MAX_GENERATIONS = 200
"""Kept in the status, the newest ones."""
SAMPLE_LENGTH = 4000
"""Characters of the model's texts that are kept in the status: it must fit into an object of the API server."""
STEPPING: tuple[GoodputState, ...] = ("training", "redoing")


class Ledger:
    """Pure book-keeping: no clock, no I/O. Made from the status as last written, it goes on where that ends.

    While no operator runs nothing is counted; the reports that agents replay afterwards carry their own times, so the
    outage counts as what they say. Facts taken in less than a status interval before a crash may be missing.
    """

    def __init__(
        self,
        status: JobStatus,
        on_step: Callable[[StepRecord], None],
        on_appraisal: Callable[[Appraisal], None] = lambda _: None,
    ) -> None:
        self._status = status
        self._on_step = on_step
        self._on_appraisal = on_appraisal
        books = status.bookkeeping
        seconds = status.goodput.seconds if status.goodput else {}
        self._timeline = Timeline(books.state, books.counted_until, seconds)
        self._incidents = IncidentLog(status.incidents)
        self._closed = status.phase in ("Succeeded", "Failed")
        self._generation: Generation | None = None
        last = status.generations[-1] if status.generations else None
        self._ran = (last.formed_as or last.number) if last is not None else 0
        self._rolled_to = last.number if last is not None and last.formed_as is not None else 0
        """The number that the ranks of the generation that ran last took by a rollback; 0: none."""
        self._saved_last: str | None = status.latest_checkpoint
        self._held_step = -1
        self._ended_number = 0
        """The generation that ended last: of it only what its ranks did before is still to come."""
        self._charges = Charges(books)
        self._blame = Blame(status.suspects)
        self._rhythm = Rhythm(status.seconds_per_step)
        self.ranks_wait: Obstacle | None = books.ranks_wait
        """What the ranks of the current generation wait for."""

    @property
    def state(self) -> GoodputState:
        """What the job does now."""
        return self._timeline.state

    @property
    def stepped_at(self) -> float | None:
        """Unix seconds of the last step that this ledger heard of."""
        return self._rhythm.stepped_at

    @property
    def recovering(self) -> str:
        """The cause of the newest fault that is not overcome yet, or an empty text."""
        return self._incidents.recovering

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """The nodes that something counts against."""
        return self._blame.suspects

    @property
    def spent(self) -> Spent:
        """What is spent of the job's budget."""
        return self._charges.spent

    @property
    def fatal(self) -> str:
        """Why a rule of the job says that the job ends; empty: none does."""
        return self._charges.fatal

    @property
    def grace_seconds(self) -> float:
        """What a worker needs to end with a checkpoint, from how long the last saves took."""
        return checkpoints.grace_seconds(self._status)

    def status(self) -> JobStatus:
        """The status given at first with all that the facts changed."""
        books = self._status.bookkeeping.model_copy(
            update={
                "state": self._timeline.state,
                "counted_until": self._timeline.counted_until,
                "restarts": self.spent.restarts,
                "program_failures": self.spent.program_failures,
                "last_failure": self.spent.last_failure,
                "ranks_wait": self.ranks_wait,
            }
        )
        return self._status.model_copy(
            update={
                "goodput": self._timeline.goodput(),
                "incidents": self._incidents.incidents(),
                "suspects": self.suspects,
                "bookkeeping": books,
            }
        )

    def knows(self, generation: int) -> bool:
        """Its members are known."""
        return self._generation is not None and self._generation.number == generation

    def adopt(self, generation: Generation) -> None:
        """A generation that was announced before this ledger was made."""
        if generation.number > self._status.generation:
            self.ranks_wait = None
        self._generation = generation
        self._incidents.adopt(generation)
        self._set(generation=max(self._status.generation, generation.number))

    def look(self, now: float, *, pods_run: bool, suspended: bool, faults: Iterable[InjectedFault] = ()) -> None:
        """What no fact says: that pods run at last, that the job is suspended or not, which faults were injected."""
        self._incidents.match(faults)
        if self._closed:
            return
        if self._timeline.counted_until is None:
            self._timeline.switch(self._timeline.state, now)
        if suspended and self.state != "suspended":
            self._timeline.switch("suspended", now)
        elif not suspended and self.state == "suspended":
            self._timeline.switch("queued", now)
        if self.state == "queued" and pods_run:
            self._timeline.switch("starting", now)

    def nodes(
        self, crashes: Iterable[tuple[str, NodeFailure]], silent: Iterable[str], now: float, recovery: Recovery
    ) -> None:
        """What was seen of nodes: workers that crashed there, and those from which nothing is heard any more."""
        self._blame.nodes(crashes, silent, now, recovery.suspects)

    def pods_failed(self, count: int, time: float, message: str, recovery: Recovery) -> None:
        """So many pods ended before they joined. Where steps are done all the same, it costs nothing: a replacement
        that can't start must not end a job that trains."""
        if self.state in STEPPING:
            return
        self._charges.pods_failed(count, time, message, recovery)

    def close(self, now: float, *, failed: bool) -> None:
        """The job ended: nothing counts any more."""
        if self._closed:
            return
        self._timeline.switch(self.state, now)
        self._closed = True
        if failed:
            self._incidents.failed()

    def record(self, fact: CoordinatorFact, recovery: Recovery) -> tuple[Event, ...]:
        """Take in the next fact; returns what people should be told at once."""
        if self._closed:
            return ()
        match fact:
            case Announced():
                return self._announced(fact)
            case Ended():
                return self._ended(fact, recovery)
            case Reported():
                return self._reported(fact, recovery)

    def _announced(self, fact: Announced) -> tuple[Event, ...]:
        self._charges.announced(fact.generation)
        self._held_step = -1
        self._generation = fact.generation
        self.ranks_wait = None
        self._incidents.announced(fact)
        if self.state in STEPPING:
            self._timeline.switch("starting", fact.time)
        self._set(generation=max(self._status.generation, fact.generation.number))
        return (events.formed(fact.generation),)

    def _ended(self, fact: Ended, recovery: Recovery) -> tuple[Event, ...]:
        self.ranks_wait = None
        self._ended_number = fact.number
        if self.state == "suspended":
            return ()
        ran = self._ran == fact.number
        step = max(fact.step, self._status.step) if ran else self._status.step
        self._incidents.ended(fact, step, lost=None if ran else 0)
        if fact.intended:
            if self.state != "recovering":
                self._timeline.switch("holding", fact.time)
            return ()
        self._timeline.switch("recovering", fact.fault_time)
        self._charges.ended(fact, self._generation, recovery)
        self._blame.ended(fact, killed=self._charges.killed)
        return (events.ended(fact, step),)

    def _reported(self, fact: Reported, recovery: Recovery) -> tuple[Event, ...]:
        if fact.generation < self._ran:
            return ()
        match body := fact.body:
            case Started():
                self._started(body, fact)
            case Restored():
                return self._restored(body, fact)
            case StepDone():
                return self._step_done(body, fact)
            case Saved():
                return self._saved(body, fact)
            case SaveFailed():
                return (events.save_failed(body),)
            case Held():
                self._held(body, fact)
            case Resumed():
                self._timeline.switch("training", fact.time)
            case Profiled():
                return self._profiled(body)
            case ProfileFailed():
                return self.profile_failed(body.command_id, body.rank, body.message)
            case Evaluated():
                return self._evaluated(body, fact)
            case Sampled():
                self._sampled(body, fact)
            case Diverged():
                return self._diverged(body, fact)
            case RolledBack():
                return self._rolled_back(body, fact)
            case Plateau():
                return (events.plateau(body),)
            case CheckpointRejected():
                return self._rejected(body, fact)
            case Failed():
                self._failed(body, fact, recovery)
            case Blocked():
                self._blocked(body, fact)
            case Unblocked():
                self._unblocked(fact.time)
            case Finished():
                self._finished(body, fact)
            case _:  # Progress, NumberTaken: the coordinator's business
                pass
        return ()

    def _started(self, body: Started, fact: Reported) -> None:
        if not self.knows(fact.generation):
            return
        everybody_runs = self._incidents.started(body.rank, fact.time)
        if everybody_runs and self.state == "starting":
            self._timeline.switch("restoring", fact.time)

    def _restored(self, body: Restored, fact: Reported) -> tuple[Event, ...]:
        self._make_up(body, fact.time)
        if fact.generation != self._ran:
            self._ran, self._rolled_to = fact.generation, 0
        self._summarize(fact.generation, body.step)
        if len(body.rollbacks) > self._status.rollbacks:  # Its ranks had no time to say so.
            self._incidents.rolled_back(body.rollbacks[-1])
        self._incidents.restored(body.step, fact.time)
        if self.state not in ("holding", "suspended"):
            self._timeline.switch(self._kind_of(body.step + 1), fact.time)
        books = self._status.bookkeeping
        place = parse_manifest_key(body.checkpoint) if body.checkpoint else None
        saved = place[1] if place else 0  # less than the step of a state in memory, which is no progress of checkpoints
        self._set(
            step=body.step,
            latest_checkpoint=body.checkpoint,
            checkpoints=checkpoints.latest(self._status, body.checkpoint),
            parameters=body.parameters or self._status.parameters,
            unigram_loss=self._status.unigram_loss if body.unigram_loss is None else body.unigram_loss,
            skipped=body.skipped,
            rollbacks=len(body.rollbacks),
            bookkeeping=books.model_copy(
                update={
                    "checkpoint_step": max(books.checkpoint_step, saved),
                    "highest_step": max(books.highest_step, body.step),
                }
            ),
        )
        return (events.begun(body.origin),) if body.origin else ()

    def _make_up(self, body: Restored, time: float) -> None:
        """Steps that are done, as the restored state shows, and that nobody lived to tell."""
        for step in body.steps:
            if self._status.step < step.step <= body.step:
                self._on_step(step_record(step, self._rolled_to or self._ran, time, self._workers(self._ran), None))
                self._set(loss=step.loss)

    def _step_done(self, body: StepDone, fact: Reported) -> tuple[Event, ...]:
        if fact.generation == self._ran and body.step <= self._status.step:
            return ()
        if fact.generation != self._ran:
            self._ran, self._rolled_to = fact.generation, 0
        self._summarize(fact.generation, body.step - 1)
        if fact.generation == self._ended_number:
            self._take_step(body, fact)
            return ()
        self.ranks_wait = None
        overcome = bool(self.recovering)
        self._incidents.resumed(fact.time)
        kind = self._kind_of(body.step)
        if body.step > self._held_step:
            if self.state not in STEPPING:
                self._timeline.switch(kind, fact.time - body.seconds)
            self._timeline.spend(fact.time, {"saving": body.stall_seconds}, kind)
            self._timeline.state = self._kind_of(body.step + 1)
        self._take_step(body, fact)
        if not overcome:
            return ()
        return (events.recovered(self._incidents.incidents()[-1], body.step, self._workers(fact.generation)),)

    def _take_step(self, body: StepDone, fact: Reported) -> None:
        books = self._status.bookkeeping
        workers, devices = self._workers(fact.generation), self._devices(fact.generation)
        record = step_record(body, self._number_of(fact), fact.time, workers, devices)
        self._rhythm.step(body.step, fact.time)
        self._set(
            step=body.step,
            tokens=body.tokens,
            loss=body.loss,
            tokens_per_second=body.tokens_per_second,
            tokens_per_second_per_device=record.tokens_per_second_per_device,
            mfu=body.mfu,
            seconds_per_step=self._rhythm.seconds_per_step,
            bookkeeping=books.model_copy(update={"highest_step": max(books.highest_step, body.step)}),
        )
        self._on_step(record)

    def _saved(self, body: Saved, fact: Reported) -> tuple[Event, ...]:
        if body.checkpoint == self._saved_last:
            return ()
        self._saved_last = body.checkpoint
        self._checkpoint(body.step, body.checkpoint, fact.time)
        self._status = checkpoints.counted(self._status, body)
        return (events.saved(body),)

    def _evaluated(self, body: Evaluated, fact: Reported) -> tuple[Event, ...]:
        self._busy(fact.time, {"evaluating": body.seconds})
        self._set(validation_loss=body.losses, evaluation_metrics=body.metrics)
        self._on_appraisal(evaluation_record(body, self._number_of(fact), fact.time))
        return (events.hook_failed(body),) if body.problem else ()

    def _sampled(self, body: Sampled, fact: Reported) -> None:
        self._busy(fact.time, {"evaluating": float("inf")})
        written = body.prompt + body.text
        if body.number:
            written = f"{self._status.sample}\n\n{written}"
        self._set(sample=written if len(written) <= SAMPLE_LENGTH else written[:SAMPLE_LENGTH] + "…")
        self._on_appraisal(sample_record(body, self._number_of(fact), fact.time))

    def answered(self, request: str) -> bool:
        """What became of this request for a profile is known."""
        return any(profile.id == request for profile in self._status.profiles)

    def profile_failed(self, request: str, rank: int, message: str) -> tuple[Event, ...]:
        """There will be no profile."""
        if self.answered(request):
            return ()
        self._profile(Profile(id=request, rank=rank, message=message))
        return (events.profile_failed(rank, message),)

    def _profiled(self, body: Profiled) -> tuple[Event, ...]:
        if self.answered(body.command_id):
            return ()
        told = body.model_dump(exclude={"kind", "command_id"})
        self._profile(Profile(id=body.command_id, **told))
        return (events.profiled(body),)

    def _profile(self, profile: Profile) -> None:
        self._set(profiles=(*self._status.profiles, profile)[-MAX_PROFILES:])

    def _held(self, body: Held, fact: Reported) -> None:
        self._held_step = max(self._held_step, body.step)
        self._checkpoint(body.step, body.checkpoint, fact.time)
        self._busy(fact.time, {"saving": float("inf")})
        if self.state in STEPPING:
            self._timeline.switch("holding", fact.time)

    def _diverged(self, body: Diverged, fact: Reported) -> tuple[Event, ...]:
        text = f"step {body.step}: {body.message}"
        began = fact.time - body.seconds
        if body.action == "Rollback":
            self._incidents.diverged(body.cause, body.step - 1, began, fact.time, text)
            self._timeline.switch("recovering", fact.time)
            return (events.diverged(body),)
        if body.action == "Drop":
            books = self._status.bookkeeping
            highest = max(books.highest_step, body.step)
            self._set(step=body.step, bookkeeping=books.model_copy(update={"highest_step": highest}))
        action = "UpdateDropped" if body.action == "Drop" else "Warned"
        if not self._incidents.noted(body.cause, action, body.step, began, fact.time, text):
            return ()
        return (events.diverged(body),)

    def _rolled_back(self, body: RolledBack, fact: Reported) -> tuple[Event, ...]:
        """Once, although every rank says so."""
        if body.number <= max(self._rolled_to, fact.generation):
            return ()
        rollback = body.rollback
        self._rolled_to = body.number
        self._incidents.rolled_back(rollback)
        self._incidents.restored(rollback.to_step, fact.time)
        summary = GenerationSummary(
            number=body.number,
            workers=self._workers(fact.generation),
            started_at_step=rollback.to_step,
            reason="RolledBack",
            formed_as=fact.generation,
        )
        self._timeline.switch(self._kind_of(rollback.to_step + 1), fact.time)
        self._set(
            generation=max(self._status.generation, body.number),
            generations=(*self._status.generations, summary)[-MAX_GENERATIONS:],
            step=rollback.to_step,
            tokens=body.tokens,
            latest_checkpoint=body.checkpoint,
            checkpoints=checkpoints.latest(self._status, body.checkpoint),
            skipped=body.skipped,
            rollbacks=body.count,
        )
        return (events.rolled_back(body),)

    def _rejected(self, body: CheckpointRejected, fact: Reported) -> tuple[Event, ...]:
        key = parse_manifest_key(body.checkpoint)
        if not self._incidents.rejected(body.checkpoint, body.message, key[1] if key else self._status.step, fact.time):
            return ()
        self._charges.corrupt()
        return (events.rejected(body),)

    def _failed(self, body: Failed, fact: Reported, recovery: Recovery) -> None:
        if self._charges.failed(body, recovery) == "Quarantine":
            self._blame.quarantine(self._node_of(fact), fact.time)

    def _blocked(self, body: Blocked, fact: Reported) -> None:
        self.ranks_wait = Obstacle(reason=body.reason, message=body.message)
        if self.state in STEPPING:
            self._timeline.switch("recovering", fact.time)

    def _unblocked(self, time: float) -> None:
        self.ranks_wait = None
        if self.state == "recovering" and not self.recovering:
            self._timeline.switch(self._kind_of(self._status.step + 1), time)

    def _finished(self, body: Finished, fact: Reported) -> None:
        self._checkpoint(body.step, body.checkpoint, fact.time)
        self._set(step=body.step, tokens=body.tokens)
        self._busy(fact.time, {"saving": float("inf")})
        self.close(fact.time, failed=False)

    def _checkpoint(self, step: int, key: str, time: float) -> None:
        """A checkpoint is in force. One of a later step than any before is progress: the budget is whole again."""
        if step > self._status.bookkeeping.checkpoint_step:
            self._charges.progressed()
        self._status = checkpoints.in_force(self._status, step, key, time)

    def _busy(self, until: float, parts: dict[GoodputState, float]) -> None:
        """Ranks between two steps did something else than training."""
        if self.state in STEPPING:
            self._timeline.spend(until, parts, self.state)

    def _kind_of(self, step: int) -> GoodputState:
        return "redoing" if step <= self._status.bookkeeping.highest_step else "training"

    def _number_of(self, fact: Reported) -> int:
        """The number of the ranks that said so: since a rollback it is not the one that they were formed under."""
        return self._rolled_to or fact.generation

    def _node_of(self, fact: Reported) -> str:
        members = self._generation.members if self._generation is not None and self.knows(fact.generation) else ()
        return next((member.node for member in members if member.slot == fact.slot), "")

    def _workers(self, generation: int) -> int:
        if self._generation is not None and self._generation.number == generation:
            return len(self._generation.members)
        return next((item.workers for item in self._status.generations if item.number == generation), 0)

    def _devices(self, generation: int) -> int | None:
        """Training processes; None: the generation's members are not known."""
        known = self._generation
        return known.world_size if known is not None and known.number == generation else None

    def _summarize(self, number: int, step: int) -> None:
        """A generation trained: it is in the list from its first sign on."""
        known = self._status.generations
        if known and known[-1].number >= number:
            return
        reason = self._generation.reason if self._generation is not None and self.knows(number) else ""
        summary = GenerationSummary(number=number, workers=self._workers(number), started_at_step=step, reason=reason)
        self._set(generations=(*known, summary)[-MAX_GENERATIONS:])

    def _set(self, **fields: object) -> None:
        self._status = self._status.model_copy(update=fields)
