"""Authentication of agents by the service-account token bound to the worker's pod.

Tokens are verified here against the API server's public keys: this needs no right to review tokens, and works for known
pods while the API server is down. A refused caller gets no detail; the log has it.
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
"""Tolerated clock skew."""
OVERTIME_SECONDS = 30.0
"""Time after its deadline when a deleting pod is refused although the API server still has it: its node may be
lost."""
REMEMBERED_PODS = 4096
LOG_SECONDS = 1.0
"""Least time between log lines with the same reason."""

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
"""Reasons of refusals; a bounded set, since each is a label value."""

_FORBIDDEN: frozenset[Reason] = frozenset({"no such pod", "pod ended", "not a worker", "another job"})

log = structlog.get_logger()


class PodReader(Protocol):
    """Reads from the API server. Raises OSError."""

    async def read(self, path: str) -> Any:
        """Return the JSON document at a path."""
        ...

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Return the current object."""
        ...


class PodCache(Protocol):
    """Cache of pods."""

    def get(self, namespace: str, name: str) -> Object | None:
        """Return the cached pod, or None."""
        ...


class _InvalidToken(Exception):
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
class _TokenPod:
    """The pod named by a token."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"pod {self.namespace}/{self.name} ({self.uid})"


class TokenReview:
    """Authenticator of agents for AgentServer.

    `namespace_of` returns the namespace of a job, None for an unknown one; `refused` is called with the reason of each
    refusal.
    """

    def __init__(
        self,
        api: PodReader,
        pods: PodCache,
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
        """Uids of deleted pods, which never come back and need no further lookup."""
        self._logged: dict[Reason, float] = {}

    async def __call__(self, request: web.Request, job_uid: str) -> Caller | AuthenticationFailure:
        """Return the worker of this job whose token the request carries, or the refusal."""
        try:
            identity = await self._identity(request.headers.get("Authorization", ""))
            return self._worker(identity, await self._pod(identity), job_uid)
        except _InvalidToken as refused:
            return self._refusal(refused.reason, str(refused), request)
        except OSError as error:
            return self._refusal("cannot verify", f"no answer from the API server: {error}", request)

    async def _identity(self, header: str) -> _TokenPod:
        """Return the pod that a valid token is bound to."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _InvalidToken("no token", "no bearer token was sent")
        claims = await self._verified(token.strip())
        now = self._clock()
        if not claims.not_before - LEEWAY_SECONDS <= now < claims.expires + LEEWAY_SECONDS:
            raise _InvalidToken("expired", f"valid {claims.not_before:.0f} to {claims.expires:.0f}, now {now:.0f}")
        binding = claims.binding
        if binding.pod is None:
            raise _InvalidToken("not bound to a pod", f"the token of namespace {binding.namespace} is bound to no pod")
        return _TokenPod(binding.namespace, binding.pod.name, binding.pod.uid)

    async def _verified(self, token: str) -> _Claims:
        found = await self._keys.find(key_id := _key_id(token))
        if found is None:
            raise _InvalidToken("unknown key", f"the API server has no signing key {key_id!r}")
        key, issuer = found
        try:
            claims = jwt.decode(
                token,
                key,
                # The key's own: a token that chooses its algorithm could pass the public key off as a shared secret.
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=issuer,
                options={
                    "require": ["exp", "nbf", "iat", "iss", "aud", "sub"],
                    # Checked by the injected clock.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            return _Claims.model_validate(claims)
        except InvalidTokenError as error:
            raise _InvalidToken(_reason(error), str(error)) from error
        except ValidationError as error:
            claim = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise _InvalidToken("missing claim", f"no usable {claim}") from error

    async def _pod(self, identity: _TokenPod) -> Object:
        """Return the pod from the cache, or from the API server if the cache does not match the token."""
        known = self._pods.get(identity.namespace, identity.name)
        if known is not None and known["metadata"]["uid"] == identity.uid:
            return known
        if identity.uid in self._gone:
            raise _InvalidToken("no such pod", f"{identity} is gone")
        try:
            pod = await self._api.get(PODS, identity.namespace, identity.name)
        except ApiError as error:
            if error.status == 404:
                self._remember_gone(identity.uid)
                raise _InvalidToken("no such pod", f"{identity} is gone") from error
            if error.status == 403:
                raise _InvalidToken("not a worker", f"{identity} is outside the operator's namespaces") from error
            raise
        if pod["metadata"]["uid"] != identity.uid:
            self._remember_gone(identity.uid)
            raise _InvalidToken("no such pod", f"{identity} was recreated")
        return pod

    def _worker(self, identity: _TokenPod, pod: Object, job_uid: str) -> Caller:
        """Return the worker of the job that the pod is."""
        worker = worker_pod(pod)
        if worker is None:
            raise _InvalidToken("not a worker", f"{identity} is not a worker's pod")
        # Check the namespace too: users of another namespace can give their pods any label and owner.
        if worker.job_uid != job_uid or self._namespace_of(job_uid) not in (None, identity.namespace):
            raise _InvalidToken("another job", f"{identity} is not a worker of job {job_uid}")
        if ended := self._ended(pod):
            raise _InvalidToken("pod ended", f"{identity} {ended}")
        return Caller(worker.slot, worker.attempt)

    def _ended(self, pod: Object) -> str:
        """Return how the pod ended; empty: it runs, or has grace time left."""
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
            log.warning("refused an agent", reason=reason, detail=detail, remote=request.remote)
        if reason == "cannot verify":
            return AuthenticationFailure(503, "tokens cannot be verified now: retry")
        if reason in _FORBIDDEN:
            return AuthenticationFailure(403, "the token does not belong to a live worker of this job")
        return AuthenticationFailure(401, "a valid token is required")


def _key_id(token: str) -> str:
    """Return the id of the key that a token claims to be signed with."""
    try:
        return str(jwt.get_unverified_header(token).get("kid", ""))
    except (InvalidTokenError, UnicodeEncodeError, RecursionError) as error:  # the latter two: strange bytes, brackets
        raise _InvalidToken("not a token", str(error)) from error


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
