"""The generation that runs: what its ranks said, and when they last did a step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from pretrain_api.messages import reports
from pretrain_api.messages.protocol import Generation, Heartbeat, Member
from pretrain_operator.coordinator.members import Agent
from pretrain_operator.liveness.rules import Verdict

COLLECTIVE_ERROR = "CollectiveError"


class Pace:
    """What is learned of the job's rhythm: the time of a step and the gaps between an agent's words."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=20)
        self._gap = 0.0

    @property
    def step_seconds(self) -> float:
        """The median duration of the last steps; 0 before the first one."""
        return median(self._steps) if self._steps else 0.0

    @property
    def gap(self) -> float:
        """The largest gap between two words of a healthy agent, slowly forgotten."""
        return self._gap

    def learn_step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def know_step(self, seconds: float) -> None:
        """What somebody else says of the time of a step: better than nothing."""
        if not self._steps and seconds > 0:
            self.learn_step(seconds)

    def learn_gap(self, seconds: float, at_most: float) -> None:
        """An agent was silent for so long and then spoke. Longer than `at_most` was no rhythm but an accident."""
        if seconds <= at_most:
            self._gap = max(seconds, self._gap * 0.995)


@dataclass(frozen=True)
class Order:
    """A checkpoint that was commanded."""

    id: str
    sent_at: float


@dataclass(eq=False)
class Running:
    """The current generation and the evidence that it lives. Mutable; one for each generation."""

    generation: Generation
    since: float
    adopted: bool = False
    """Told by agents to a coordinator that did not form it."""
    step: int = 0
    stepped: bool = False
    """A step was done since it was formed."""
    evaluating: bool = False
    """Between two steps the model is evaluated, or writes: for how long depends on the job."""
    advanced_at: float = 0.0
    """When steps last advanced, which takes all members."""
    active_at: float = 0.0
    """When any rank last said that it got on."""
    pids: dict[int, int] = field(default_factory=dict[int, int])
    verdict: Verdict | None = None
    """Why it must end, as its ranks said."""
    suspicion: Verdict | None = None
    """The first collective error: some member is in trouble, this one most likely not."""
    held: reports.Held | None = None
    told: int = 0
    """The last step that rank 0 told of. A hold counts once its step was told: what comes after the end is late."""
    untold: reports.Held | None = None
    """A hold that others said before that."""
    held_at: float = 0.0
    resumed: set[str] = field(default_factory=set[str])
    order: Order | None = None
    profile: str = ""
    """The last request for a profile that the ranks were told of."""
    rolled_to: int = 0
    """The number that its ranks took by their last rollback; 0: none."""

    def __post_init__(self) -> None:
        self.advanced_at = self.active_at = self.since
        if self.adopted:
            self.advanced_at = float("-inf")

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.generation.number

    def member(self, agent_id: str) -> Member | None:
        """The place of this agent."""
        return next((member for member in self.generation.members if member.agent_id == agent_id), None)

    def beat(self, agent: Agent, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat's step is progress when it changed within this generation; at first it may be an older one's."""
        if heartbeat.generation != self.number:
            return
        agent.rankless_at = None
        if agent.step_generation != self.number:
            agent.step, agent.step_generation = heartbeat.step, self.number
        elif heartbeat.step != agent.step:
            self._advance(agent, heartbeat.step, now)

    def reconnected(self, agent: Agent, now: float) -> None:
        """A hello that claims this generation is as good as a heartbeat, and tells of the time before."""
        ago = agent.hello.stepped_seconds
        self.advanced_at = max(self.advanced_at, self.since if ago is None else now - ago)
        self.beat(agent, Heartbeat(generation=self.number, step=agent.hello.step), now)

    def take(self, agent: Agent, body: reports.ReportBody, now: float) -> None:
        """Note what a rank of this generation said, once."""
        agent.rankless_at = None
        match body:
            case reports.StepDone() | reports.Progress():
                if agent.step_generation != self.number or body.step > agent.step:
                    self._advance(agent, body.step, now)
                if isinstance(body, reports.StepDone):
                    self._told(body.step, now)
            case reports.Diverged(action="Rollback"):
                self.stepped = False  # A restore follows, which takes the time that it takes at a start.
                self.advanced_at = now
            case reports.Diverged(action="Drop"):
                self._advance(agent, body.step, now)
            case reports.RolledBack():
                self._rolled_back(agent, body, now)
            case reports.Failed():
                self._failed(agent, body, now)
                return
            case reports.Started():
                self.pids[body.rank] = body.pid
            case reports.Restored():
                self.step = max(self.step, body.step)
            case reports.Evaluating():
                self.evaluating = True
                self.advanced_at = now
            case reports.Evaluated() | reports.Sampled():
                self.advanced_at = now
            case reports.Held():
                member = self.member(agent.id)
                if body.step <= self.told or (member is not None and member.rank == 0):
                    self._hold(body, now)
                else:
                    self.untold = body
            case reports.Resumed():
                self._resume(body)
            case reports.CheckpointRejected():
                self._accuse(Verdict("CheckpointRejected", now, None, body.message))
            case reports.NumberTaken():
                self._accuse(Verdict("NumberTaken", now, None, f"the lineage has number {body.highest} already"))
            case _:
                pass
        self.active_at = now

    def _told(self, step: int, now: float) -> None:
        self.told = step
        if self.untold is not None and self.untold.step <= step:
            held, self.untold = self.untold, None
            self._hold(held, now)

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

    def _rolled_back(self, agent: Agent, body: reports.RolledBack, now: float) -> None:
        """Steps count anew from an earlier one. All ranks say so, some when others have done steps since."""
        agent.step, agent.step_generation = body.rollback.to_step, self.number
        self.advanced_at = now
        if body.number > self.rolled_to:
            self.rolled_to, self.step, self.held = body.number, body.rollback.to_step, None
            self.told, self.untold = self.step, None

    def _resume(self, body: reports.Resumed) -> None:
        self.resumed.add(body.command_id)
        if self.held is not None and self.held.command_id == body.command_id:
            self.held = None

    def _failed(self, agent: Agent, body: reports.Failed, now: float) -> None:
        message = f"rank {body.rank}: {body.reason}" + (f": {body.message}" if body.message else "")
        if body.reason == COLLECTIVE_ERROR:
            # Who reports it is a victim: nobody is named.
            self.suspicion = self.suspicion or Verdict("RankFailed", now, None, message)
        else:
            self._accuse(Verdict("RankFailed", now, self.member(agent.id), message))

    def _accuse(self, verdict: Verdict) -> None:
        self.verdict = self.verdict or verdict
