"""A run's facts in words: the Events by which `kubectl describe` and a run's log tell its story."""

from __future__ import annotations

from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import (
    CheckpointRejected,
    Diverged,
    Evaluated,
    Plateau,
    Profiled,
    RolledBack,
    Saved,
    SaveFailed,
)
from pretrain_api.status.job import Incident
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import Ended


def formed(generation: Generation) -> Event:
    """Agents were told to start its ranks."""
    text = f"generation {generation.number} with {_counted(len(generation.members), 'worker')}"
    return Event("Normal", "GenerationFormed", f"{text}: {generation.reason}")


def ended(fact: Ended, step: int) -> Event:
    """A fault ended a generation that had done this step."""
    who = "" if fact.slot is None else f" (worker {fact.slot})"
    where = f" on {fact.node}" if fact.node else ""
    text = f"generation {fact.number} ended at step {step}{who}{where}"
    return Event("Warning", fact.cause, f"{text}: {fact.message}" if fact.message else text)


def recovered(incident: Incident, step: int, workers: int) -> Event:
    """The end of the story that the end of a generation began."""
    text = f"step {step} is done by {_counted(workers, 'worker')}"
    if incident.resumed_seconds is not None:
        text += f", {incident.resumed_seconds:.1f} s after the fault ({incident.cause})"
    if (lost := incident.steps_lost) is not None:
        text += f", with {_counted(lost, 'step')} to do again" if lost else ", with no step lost"
    return Event("Normal", "Recovered", text)


def saved(body: Saved) -> Event:
    """A checkpoint is in force."""
    return Event("Normal", "CheckpointSaved", f"checkpoint of step {body.step} in {body.seconds:.2f} s")


def save_failed(body: SaveFailed) -> Event:
    """It is tried again with the next one."""
    return Event("Warning", "SaveFailed", f"no checkpoint of step {body.step}: {body.message}")


def rejected(body: CheckpointRejected) -> Event:
    """A damaged checkpoint was passed over."""
    return Event("Warning", "CheckpointCorrupt", f"{body.checkpoint} can't be used: {body.message}")


def hook_failed(body: Evaluated) -> Event:
    """The user's evaluation raised."""
    return Event("Warning", "EvaluationHookFailed", f"step {body.step}: {body.problem}; training goes on")


def profiled(body: Profiled) -> Event:
    """A trace is in the store."""
    text = f"steps {body.first_step} to {body.last_step} of rank {body.rank}: {body.location}"
    return Event("Normal", "ProfileSaved", text)


def profile_failed(rank: int, message: str) -> Event:
    """There will be no profile."""
    return Event("Warning", "ProfileFailed", f"no profile of rank {rank}: {message}")


def diverged(body: Diverged) -> Event:
    """What the detector saw, and what is done about it unless it is a rollback, which has an Event of its own."""
    done = {"Rollback": "", "Drop": "; the update was dropped"}.get(body.action, "; training goes on")
    return Event("Warning", body.cause, f"step {body.step}: {body.message}{done}")


def rolled_back(body: RolledBack) -> Event:
    """From where it goes on, and what is different this time."""
    rollback = body.rollback
    text = f"generation {body.number} goes on from step {rollback.to_step}"
    if rollback.skipped is not None:
        text += f" and passes over the data of steps {rollback.skipped.first} to {rollback.skipped.last}"
    if rollback.slowed is not None:
        text += f", with {rollback.slowed.factor:g} times the learning rate up to step {rollback.slowed.last}"
    return Event("Warning", "RolledBack", f"{text}; rollback {body.count} of this job")


def plateau(body: Plateau) -> Event:
    """The loss falls no more."""
    return Event(
        "Warning", "LossPlateau", f"step {body.step}: the mean loss has been at {body.lowest:.4f} or above for long"
    )


def begun(origin: str) -> Event:
    """A run that begins with the weights of something else."""
    return Event("Normal", "Begun", f"the first weights are {origin}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
