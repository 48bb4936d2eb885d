"""Who may speak for a worker: whoever shows the service-account token that the API server bound to the worker's pod.

The token is verified here, against the API server's public keys: no right to review tokens is needed, and an API server
that is away stops nobody whose pod is known. A caller that is refused learns nothing; the log says why.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

import jwt
import structlog
from aiohttp import web
from jwt.exceptions import (
    InvalidAudienceError,
    InvalidIssuerError,
    InvalidSignatureError,
    InvalidTokenError,
    MissingRequiredClaimError,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain_operator.coordinator.authentication import AuthenticationFailure, Caller
from pretrain_operator.kubernetes.client.api import PODS, ApiError, Object, Resource
from pretrain_operator.kubernetes.server.signing_keys import KeyRing
from pretrain_operator.kubernetes.workload.names import worker_pod

LEEWAY_SECONDS = 10.0
"""Clocks differ by so much."""
OVERTIME_SECONDS = 30.0
"""A pod that should have ended so long ago speaks no more, though the API server still has it: its node may be lost."""
REMEMBERED_PODS = 4096
LOG_SECONDS = 1.0
"""Between two lines of the log for one reason."""

Reason = Literal[
    "no token",
    "not a token",
    "unknown key",
    "bad signature",
    "wrong issuer",
    "wrong audience",
    "missing claim",
    "expired",
    "not bound to a pod",
    "no such pod",
    "pod ended",
    "not a worker",
    "another job",
    "cannot verify",
]
"""Why a caller is refused: few, since they are counted."""

_FORBIDDEN: frozenset[Reason] = frozenset({"no such pod", "pod ended", "not a worker", "another job"})

log = structlog.get_logger()


class ApiServer(Protocol):
    """What is asked of the API server. Raises OSError."""

    async def read(self, path: str) -> Any:
        """A document."""
        ...

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """An object, as it is now."""
        ...


class KnownPods(Protocol):
    """The pods that are watched."""

    def get(self, namespace: str, name: str) -> Object | None:
        """A pod as it was a moment ago."""
        ...


class _Refused(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


class _BoundTo(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    uid: str


class _Binding(BaseModel):
    model_config = ConfigDict(frozen=True)
    namespace: str
    pod: _BoundTo | None = None


class _Claims(BaseModel):
    model_config = ConfigDict(frozen=True)
    expires: float = Field(alias="exp")
    not_before: float = Field(alias="nbf")
    binding: _Binding = Field(alias="kubernetes.io")


@dataclass(frozen=True)
class _Identity:
    """A pod as the token names it."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"pod {self.namespace}/{self.name} ({self.uid})"


class TokenReview:
    """Tells by its token which worker of a job calls; for AgentServer.

    `namespace_of`: where a job of this operator lives, None for one that it does not know; `refused` hears the reason
    of each refusal.
    """

    def __init__(
        self,
        api: ApiServer,
        pods: KnownPods,
        audience: str,
        namespace_of: Callable[[str], str | None],
        refused: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._pods = pods
        self._audience = audience
        self._namespace_of = namespace_of
        self._refused = refused
        self._clock = clock
        self._keys = KeyRing(api.read, clock)
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Uids of pods that are no more. A uid never comes back, so these are never asked for again."""
        self._logged: dict[Reason, float] = {}

    async def __call__(self, request: web.Request, job_uid: str) -> Caller | AuthenticationFailure:
        """The worker of this job whose token the request carries."""
        try:
            identity = await self._identity(request.headers.get("Authorization", ""))
            return self._worker(identity, await self._pod(identity), job_uid)
        except _Refused as refused:
            return self._refusal(refused.reason, str(refused), request)
        except OSError as error:
            return self._refusal("cannot verify", f"the API server does not tell: {error}", request)

    async def _identity(self, header: str) -> _Identity:
        """The pod that a valid token is bound to."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _Refused("no token", "no bearer token was sent")
        claims = await self._verified(token.strip())
        now = self._clock()
        if not claims.not_before - LEEWAY_SECONDS <= now < claims.expires + LEEWAY_SECONDS:
            raise _Refused("expired", f"valid from {claims.not_before:.0f} to {claims.expires:.0f}, now is {now:.0f}")
        binding = claims.binding
        if binding.pod is None:
            raise _Refused("not bound to a pod", f"a token of namespace {binding.namespace} that no pod was given")
        return _Identity(binding.namespace, binding.pod.name, binding.pod.uid)

    async def _verified(self, token: str) -> _Claims:
        found = await self._keys.find(key_id := _key_id(token))
        if found is None:
            raise _Refused("unknown key", f"the API server has no signing key {key_id!r}")
        key, issuer = found
        try:
            claims = jwt.decode(
                token,
                key,
                # The key's own: a token that chose its algorithm could have the public key taken for a shared secret.
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=issuer,
                options={
                    "require": ["exp", "nbf", "iat", "iss", "aud", "sub"],
                    # By our clock, below.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            return _Claims.model_validate(claims)
        except InvalidTokenError as error:
            raise _Refused(_reason(error), str(error)) from error
        except ValidationError as error:
            claim = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise _Refused("missing claim", f"no usable {claim}") from error

    async def _pod(self, identity: _Identity) -> Object:
        """The pod itself: as watched, or from the API server when the watch does not show it as the token says."""
        known = self._pods.get(identity.namespace, identity.name)
        if known is not None and known["metadata"]["uid"] == identity.uid:
            return known
        if identity.uid in self._gone:
            raise _Refused("no such pod", f"{identity} is gone")
        try:
            pod = await self._api.get(PODS, identity.namespace, identity.name)
        except ApiError as error:
            if error.status == 404:
                self._remember_gone(identity.uid)
                raise _Refused("no such pod", f"{identity} is gone") from error
            if error.status == 403:
                raise _Refused("not a worker", f"{identity} is where this operator sees no pods") from error
            raise
        if pod["metadata"]["uid"] != identity.uid:
            self._remember_gone(identity.uid)
            raise _Refused("no such pod", f"{identity} was replaced by another of its name")
        return pod

    def _worker(self, identity: _Identity, pod: Object, job_uid: str) -> Caller:
        """Which worker of the job the pod is."""
        worker = worker_pod(pod)
        if worker is None:
            raise _Refused("not a worker", f"{identity} is no worker's")
        # The namespace too: whoever may create pods elsewhere can give them any label and any owner.
        if worker.job_uid != job_uid or self._namespace_of(job_uid) not in (None, identity.namespace):
            raise _Refused("another job", f"{identity} is no worker of job {job_uid}")
        if ended := self._ended(pod):
            raise _Refused("pod ended", f"{identity} {ended}")
        return Caller(worker.slot, worker.attempt)

    def _ended(self, pod: Object) -> str:
        """How the pod ended; empty: it runs, or has time left to end well."""
        phase = pod.get("status", {}).get("phase", "Pending")
        if phase in ("Succeeded", "Failed"):
            return f"has phase {phase}"
        deadline = pod["metadata"].get("deletionTimestamp")
        if deadline and datetime.fromisoformat(deadline).timestamp() + OVERTIME_SECONDS < self._clock():
            return f"should have ended at {deadline}"
        return ""

    def _remember_gone(self, uid: str) -> None:
        self._gone[uid] = None
        if len(self._gone) > REMEMBERED_PODS:
            self._gone.popitem(last=False)

    def _refusal(self, reason: Reason, detail: str, request: web.Request) -> AuthenticationFailure:
        self._refused(reason)
        now = self._clock()
        if not 0 <= now - self._logged.get(reason, float("-inf")) < LOG_SECONDS:
            self._logged[reason] = now
            log.warning("an agent was refused", reason=reason, detail=detail, remote=request.remote)
        if reason == "cannot verify":
            return AuthenticationFailure(503, "tokens cannot be verified at the moment: try again")
        if reason in _FORBIDDEN:
            return AuthenticationFailure(403, "the token is not that of a live worker of this job")
        return AuthenticationFailure(401, "a valid token is needed")


def _key_id(token: str) -> str:
    """Which key a token says that it was signed with."""
    try:
        return str(jwt.get_unverified_header(token).get("kid", ""))
    except (InvalidTokenError, UnicodeEncodeError, RecursionError) as error:  # the latter two: strange bytes, brackets
        raise _Refused("not a token", str(error)) from error


def _reason(error: InvalidTokenError) -> Reason:
    match error:
        case InvalidSignatureError():
            return "bad signature"
        case InvalidIssuerError():
            return "wrong issuer"
        case InvalidAudienceError():
            return "wrong audience"
        case MissingRequiredClaimError():
            return "missing claim"
        case _:
            return "not a token"
