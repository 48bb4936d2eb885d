"""Projection of profiles: the answers to the last requests."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.reports import Profiled, ProfileFailed
from pretrain_api.status.job import JobStatus, Profile
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import ProfileRefused
from pretrain_operator.projections.projection import Context, Effects, Projection, on

MAX_PROFILES = 5
"""Kept in the status, the newest ones."""


@dataclass(frozen=True)
class ProfileSlice:
    """Slice of the status: answered requests for a profile."""

    profiles: tuple[Profile, ...] = ()


Folded = tuple[ProfileSlice, Effects]


def restore(status: JobStatus) -> ProfileSlice:
    """Read the slice."""
    return ProfileSlice(status.profiles)


def write(slice_: ProfileSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(update={"profiles": slice_.profiles})


def profiled(slice_: ProfileSlice, body: Profiled, _: Context) -> Folded:
    """Add a trace that is in the store."""
    values = body.model_dump(exclude={"kind", "command_id"})
    text = f"steps {body.first_step} to {body.last_step} of rank {body.rank}: {body.location}"
    event = Event("Normal", "ProfileSaved", text)
    return _with(slice_, Profile(id=body.command_id, **values)), Effects(events=(event,))


def profile_failed(slice_: ProfileSlice, body: ProfileFailed, _: Context) -> Folded:
    """Add a request that the rank could not carry out."""
    return _failed(slice_, body.command_id, body.rank, body.message)


def profile_refused(slice_: ProfileSlice, fact: ProfileRefused, _: Context) -> Folded:
    """Add a request that no rank was asked to carry out."""
    return _failed(slice_, fact.request, 0, fact.message)


def _failed(slice_: ProfileSlice, request: str, rank: int, message: str) -> Folded:
    event = Event("Warning", "ProfileFailed", f"no profile of rank {rank}: {message}")
    return _with(slice_, Profile(id=request, rank=rank, message=message)), Effects(events=(event,))


def _with(slice_: ProfileSlice, profile: Profile) -> ProfileSlice:
    return ProfileSlice((*slice_.profiles, profile)[-MAX_PROFILES:])


PROFILES = Projection(
    name="profiles",
    restore=restore,
    write=write,
    rules=(on(Profiled, profiled), on(ProfileFailed, profile_failed), on(ProfileRefused, profile_refused)),
)
