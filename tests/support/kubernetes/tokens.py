"""Service-account tokens and an API server that published the keys for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from pretrain_api.spec.job import API_VERSION, KIND
from pretrain_operator.coordinator.authentication import AuthenticationFailure, Caller
from pretrain_operator.kubernetes.client.api import PODS, ApiError, Object, Resource
from pretrain_operator.kubernetes.server.tokens import TokenReview

NOON = 1_750_000_000.0
ISSUER, AUDIENCE, JOB, NAMESPACE = "https://kubernetes.default.svc", "pretrain.dev", "job-uid-1", "team"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def published(key: Key, key_id: str = "k1", **changes: object) -> dict[str, Any]:
    """A public key as the API server publishes it."""
    if isinstance(key, rsa.RSAPrivateKey):
        data = json.loads(RSAAlgorithm.to_jwk(key.public_key())) | {"alg": "RS256"}
    else:
        data = json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"alg": "ES256"}
    return {**data, "use": "sig", "kid": key_id, **changes}


def claims(**changes: object) -> dict[str, Any]:
    """What the token of a-pod says; a change to None leaves a claim out."""
    said = {
        "aud": [AUDIENCE],
        "exp": int(NOON) + 3600,
        "iat": int(NOON) - 60,
        "nbf": int(NOON) - 60,
        "iss": ISSUER,
        "jti": "x",
        "sub": "system:serviceaccount:team:default",
        "kubernetes.io": {
            "namespace": NAMESPACE,
            "pod": {"name": "a-pod", "uid": "a-uid"},
            "serviceaccount": {"name": "default", "uid": "s"},
        },
        **changes,
    }
    return {claim: value for claim, value in said.items() if value is not None}


def a_token(key: Any = RSA_KEY, key_id: str | None = "k1", algorithm: str | None = "RS256", **changes: object) -> str:
    headers = {} if key_id is None else {"kid": key_id}
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def a_pod(
    uid: str = "a-uid", name: str = "a-pod", phase: str = "Running", owner: str = JOB, **labels: str | None
) -> Object:
    """A worker's pod; a label that is None is left out."""
    given = {"job-uid": JOB, "slot": "2", "attempt": "3"} | {key.replace("_", "-"): v for key, v in labels.items()}
    return {
        "metadata": {
            "namespace": NAMESPACE,
            "name": name,
            "uid": uid,
            "labels": {f"pretrain.dev/{key}": value for key, value in given.items() if value is not None},
            "ownerReferences": [
                {"apiVersion": API_VERSION, "kind": KIND, "name": "j", "uid": owner, "controller": True}
            ],
        },
        "status": {"phase": phase},
    }


@dataclass
class FakeApiServer:
    """Publishes keys and has pods; can fail, and counts what is asked."""

    keys: list[dict[str, Any]] = field(default_factory=lambda: [published(RSA_KEY)])
    issuer: str = ISSUER
    pods: dict[tuple[str, str], Object] = field(default_factory=dict)
    error: OSError | None = None
    hangs: bool = False
    asked: list[str] = field(default_factory=list)

    async def read(self, path: str) -> Any:
        self.asked.append(path)
        await self._answer()
        return {"issuer": self.issuer} if path.endswith("openid-configuration") else {"keys": self.keys}

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        assert resource == PODS
        self.asked.append(f"{namespace}/{name}")
        await self._answer()
        if (namespace, name) not in self.pods:
            raise ApiError(404, "NotFound", f'pods "{name}" not found')
        return self.pods[namespace, name]

    async def _answer(self) -> None:
        await asyncio.sleep(3600 if self.hangs else 0)
        if self.error is not None:
            raise self.error


@dataclass
class Watched:
    """What a pod informer shows."""

    pods: dict[tuple[str, str], Object] = field(default_factory=dict)

    def get(self, namespace: str, name: str) -> Object | None:
        return self.pods.get((namespace, name))


class Gate:
    """A TokenReview with all that stands around it, and a clock to turn."""

    def __init__(self, pod: Object | None = None, watched: bool = True) -> None:
        self.api, self.watched, self.now = FakeApiServer(), Watched(), NOON
        self.reasons: list[str] = []
        self.namespaces: dict[str, str] = {JOB: NAMESPACE}
        if pod is not None:
            self.has(pod, watched=watched)
        self.review = TokenReview(
            self.api, self.watched, AUDIENCE, self.namespaces.get, self.reasons.append, lambda: self.now
        )

    def has(self, pod: Object, watched: bool = True) -> None:
        place = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        self.api.pods[place] = pod
        if watched:
            self.watched.pods[place] = pod

    async def asks(self, token: str | None, job: str = JOB) -> Caller | AuthenticationFailure:
        """What a caller with this token is answered."""
        return await self.asks_with({} if token is None else {"Authorization": f"Bearer {token}"}, job)

    async def asks_with(self, headers: Mapping[str, str], job: str = JOB) -> Caller | AuthenticationFailure:
        return await self.review(SimpleNamespace(headers=headers, remote="10.0.0.9"), job)

    async def refuses(self, token: str | None, job: str = JOB) -> tuple[int, str]:
        """The status and the reason with which a caller is refused."""
        answer = await self.asks(token, job)
        assert isinstance(answer, AuthenticationFailure), answer
        return answer.status, self.reasons[-1]
