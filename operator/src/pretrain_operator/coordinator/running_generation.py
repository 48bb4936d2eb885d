"""The running generation: its ranks' reports, and the time of its last progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain_api.messages import reports
from pretrain_api.messages.protocol import Generation, Heartbeat, Member
from pretrain_operator.coordinator.members import Agent
from pretrain_operator.liveness.rules import GenerationVerdict

COLLECTIVE_ERROR = "CollectiveError"


@dataclass(frozen=True)
class PendingCheckpointCommand:
    """A commanded checkpoint that the ranks have not answered yet."""

    id: str
    sent_at: float


@dataclass(eq=False)
class RunningGeneration:
    """The current generation and the evidence of its progress. Mutable; one instance per generation."""

    generation: Generation
    since: float
    adopted: bool = False
    """Formed by another coordinator and learned from hellos."""
    step: int = 0
    stepped: bool = False
    """This generation completed a step."""
    evaluating: bool = False
    """An evaluation or a sample runs between two steps; its duration depends on the job."""
    advanced_at: float = 0.0
    """Last completed step, which takes all members."""
    active_at: float = 0.0
    """Last progress that any rank reported."""
    pids: dict[int, int] = field(default_factory=dict[int, int])
    verdict: GenerationVerdict | None = None
    """Cause of the end that the ranks' own reports prove."""
    suspicion: GenerationVerdict | None = None
    """The first collective error: a member failed, most likely not the one that reports it."""
    held: reports.Held | None = None
    reported_step: int = 0
    """Last step that rank 0 reported. A hold counts once its step is reported: a report after the end is too late."""
    early_hold: reports.Held | None = None
    """A hold that other ranks reported before rank 0 reported its step."""
    held_at: float = 0.0
    resumed: set[str] = field(default_factory=set[str])
    command: PendingCheckpointCommand | None = None
    profile: str = ""
    """Last profile request that was sent to the ranks."""
    rolled_to: int = 0
    """Generation number that its ranks took by their last rollback; 0: none."""

    def __post_init__(self) -> None:
        self.advanced_at = self.active_at = self.since
        if self.adopted:
            self.advanced_at = float("-inf")

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.generation.number

    def member(self, agent_id: str) -> Member | None:
        """Return the member that this agent is, or None."""
        return next((member for member in self.generation.members if member.agent_id == agent_id), None)

    def heartbeat(self, agent: Agent, heartbeat: Heartbeat, now: float) -> None:
        """Count a changed step as progress. The first heartbeat may carry an older generation's step."""
        if heartbeat.generation != self.number:
            return
        agent.rankless_at = None
        if agent.step_generation != self.number:
            agent.step, agent.step_generation = heartbeat.step, self.number
        elif heartbeat.step != agent.step:
            self._advance(agent, heartbeat.step, now)

    def reconnected(self, agent: Agent, now: float) -> None:
        """Treat a hello that claims this generation as a heartbeat that also dates the last step."""
        ago = agent.hello.stepped_seconds
        self.advanced_at = max(self.advanced_at, self.since if ago is None else now - ago)
        self.heartbeat(agent, Heartbeat(generation=self.number, step=agent.hello.step), now)

    def report(self, agent: Agent, body: reports.ReportBody, now: float) -> None:
        """Record a report of one of its ranks."""
        agent.rankless_at = None
        match body:
            case reports.Failed():
                self._failed(agent, body, now)
                return  # a failure is no progress
            case reports.StepDone() | reports.Progress():
                self._step_done(agent, body, now)
            case reports.Evaluating() | reports.Evaluated() | reports.Sampled():
                self.evaluating = self.evaluating or isinstance(body, reports.Evaluating)
                self.advanced_at = now
            case reports.Diverged() | reports.RolledBack():
                self._diverged(agent, body, now)
            case reports.Held() | reports.Resumed():
                self._holds(agent, body, now)
            case reports.Started():
                self.pids[body.rank] = body.pid
            case reports.Restored():
                self.step = max(self.step, body.step)
            case reports.CheckpointRejected():
                self._end_with(GenerationVerdict("CheckpointRejected", now, None, body.message))
            case reports.NumberTaken():
                message = f"the lineage already has generation {body.highest}"
                self._end_with(GenerationVerdict("NumberTaken", now, None, message))
            case _:
                pass
        self.active_at = now

    def refused(self, agent: Agent, message: str, now: float) -> None:
        """Record that a member sent what no correct worker sends."""
        member = self.member(agent.id)
        if member is not None:
            self._end_with(GenerationVerdict("RankFailed", now, member, f"worker {member.slot}: {message}"))

    def _step_done(self, agent: Agent, body: reports.StepDone | reports.Progress, now: float) -> None:
        if agent.step_generation != self.number or body.step > agent.step:
            self._advance(agent, body.step, now)
        if not isinstance(body, reports.StepDone):
            return
        self.reported_step = body.step
        if self.early_hold is not None and self.early_hold.step <= body.step:
            held, self.early_hold = self.early_hold, None
            self._hold(held, now)

    def _holds(self, agent: Agent, body: reports.Held | reports.Resumed, now: float) -> None:
        if isinstance(body, reports.Resumed):
            self.resumed.add(body.command_id)
            if self.held is not None and self.held.command_id == body.command_id:
                self.held = None
            return
        member = self.member(agent.id)
        if body.step <= self.reported_step or (member is not None and member.rank == 0):
            self._hold(body, now)
        else:
            self.early_hold = body

    def _hold(self, body: reports.Held, now: float) -> None:
        if body.command_id not in self.resumed and body.step >= self.step:
            self.held, self.held_at = body, self.held_at if self.held else now
            self.step = body.step

    def _advance(self, agent: Agent, step: int, now: float) -> None:
        agent.step, agent.step_generation = step, self.number
        self.step = max(self.step, step)
        self.stepped = True
        self.evaluating = False
        self.advanced_at = self.active_at = now
        if self.held is not None and step > self.held.step:
            self.held = None

    def _diverged(self, agent: Agent, body: reports.Diverged | reports.RolledBack, now: float) -> None:
        if isinstance(body, reports.RolledBack):
            self._rolled_back(agent, body, now)
        elif body.action == "Rollback":
            self.stepped = False  # a restore follows, with a start's timeouts
            self.advanced_at = now
        elif body.action == "Drop":
            self._advance(agent, body.step, now)

    def _rolled_back(self, agent: Agent, body: reports.RolledBack, now: float) -> None:
        """Restart the step count at an earlier step. All ranks report it, some after others completed steps again."""
        agent.step, agent.step_generation = body.rollback.to_step, self.number
        self.advanced_at = now
        if body.number > self.rolled_to:
            self.rolled_to, self.step, self.held = body.number, body.rollback.to_step, None
            self.reported_step, self.early_hold = self.step, None

    def _failed(self, agent: Agent, body: reports.Failed, now: float) -> None:
        message = f"rank {body.rank}: {body.reason}" + (f": {body.message}" if body.message else "")
        if body.reason == COLLECTIVE_ERROR:
            # The reporting rank is a victim: blame no member.
            self.suspicion = self.suspicion or GenerationVerdict("RankFailed", now, None, message)
        else:
            self._end_with(GenerationVerdict("RankFailed", now, self.member(agent.id), message))

    def _end_with(self, verdict: GenerationVerdict) -> None:
        self.verdict = self.verdict or verdict
