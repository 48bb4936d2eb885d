"""`pretrain profile`: record some steps of a running job without disturbing it.

The request reaches a local run as a file in its folder, and a job on Kubernetes as an annotation. The answer is in the
job's status.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable

from pretrain_api.messages.profile_request import InvalidProfile, ProfileRequest, parse_request
from pretrain_api.status.job import Profile
from pretrain_cli.errors import BadInput, CliExit
from pretrain_cli.targets.profile_target import ProfileTarget, ProfileUnanswered, profile_target

POLL_SECONDS = 0.25
FINAL_PHASES = ("Succeeded", "Failed")


def profile(name: str, namespace: str | None, steps: int, rank: int, patience: float) -> int:
    """Request a trace, wait and print its location; return the exit code."""
    try:
        request = parse_request(ProfileRequest(uuid.uuid4().hex[:12], steps, rank).text)
        target = profile_target(name, namespace)
        target.ask(request)
        print(f"requested a trace of {steps} step{'s' * (steps != 1)} of rank {rank}", file=sys.stderr)
        answer = await_answer(target, request, patience, time.monotonic, time.sleep)
    except (BadInput, InvalidProfile) as problem:
        print(problem, file=sys.stderr)
        return CliExit.BAD_INPUT
    except (ProfileUnanswered, KeyboardInterrupt) as problem:
        print(problem if str(problem) else "stopped waiting; the result will be in the job's status", file=sys.stderr)
        return CliExit.FAILED
    if answer.message:
        print(f"no profile: {answer.message}", file=sys.stderr)
        return CliExit.FAILED
    print(
        f"{answer.location}\n"
        f"steps {answer.first_step} to {answer.last_step} of rank {answer.rank}, {answer.bytes / 2**20:.1f} MiB; "
        "open it in https://ui.perfetto.dev or chrome://tracing"
    )
    return CliExit.DONE


def await_answer(
    job: ProfileTarget,
    request: ProfileRequest,
    patience: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Profile:
    """Wait for the result. Raises ProfileUnanswered after `patience` seconds, or when the job has ended."""
    deadline = clock() + patience
    while True:
        status = job.status()
        if answer := next((item for item in status.profiles if item.id == request.id), None):
            return answer
        if status.phase in FINAL_PHASES:
            raise ProfileUnanswered(f"the job has ended ({status.phase}): there is no profile")
        if clock() >= deadline:
            raise ProfileUnanswered(
                f"no answer within {patience:g} s: the job is {status.phase}. The request stays; its result will be "
                "in the job's status and Events"
            )
        sleep(POLL_SECONDS)
