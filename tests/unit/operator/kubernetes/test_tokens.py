"""Which tokens are believed, and what their bearers are told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from pretrain_operator.coordinator.authentication import AuthenticationFailure, Caller
from pretrain_operator.kubernetes.client.api import ApiError
from pretrain_operator.kubernetes.server.signing_keys import PAUSE_SECONDS, STALE_SECONDS
from pretrain_operator.kubernetes.server.tokens import LEEWAY_SECONDS, OVERTIME_SECONDS
from support.kubernetes.tokens import (
    EC_KEY,
    JOB,
    NAMESPACE,
    NOON,
    OTHER_KEY,
    RSA_KEY,
    Gate,
    a_pod,
    a_token,
    claims,
    published,
)

WORKER = Caller(slot=2, attempt=3)
BINDING = claims()["kubernetes.io"]


def part(data: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=").decode()


def public_pem() -> bytes:
    return RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def signed_with_the_public_key() -> str:
    """HS256 with the public key as the secret, made by hand: jwt refuses to."""
    text = f"{part({'alg': 'HS256', 'kid': 'k1', 'typ': 'JWT'})}.{part(claims())}"
    signature = hmac.new(public_pem(), text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


# --- who is believed --------------------------------------------------------------------------------------------------


async def test_the_token_of_a_live_worker_tells_which_one_it_is() -> None:
    assert await Gate(a_pod()).asks(a_token()) == WORKER


async def test_a_token_signed_with_an_elliptic_curve_is_as_good() -> None:
    gate = Gate(a_pod())
    gate.api.keys = [published(RSA_KEY), published(EC_KEY, "k2")]

    assert await gate.asks(a_token(EC_KEY, "k2", "ES256")) == WORKER


async def test_the_scheme_is_not_case_sensitive() -> None:
    assert await Gate(a_pod()).asks_with({"Authorization": f"bearer  {a_token()}"}) == WORKER


async def test_a_pod_that_the_watch_does_not_show_yet_is_looked_up() -> None:
    assert await Gate(a_pod(), watched=False).asks(a_token()) == WORKER


async def test_a_pod_that_the_watch_shows_with_an_older_uid_is_looked_up() -> None:
    gate = Gate(a_pod(uid="older"))
    gate.has(a_pod(), watched=False)

    assert await gate.asks(a_token()) == WORKER


async def test_a_pod_that_is_watched_is_not_asked_for() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.error = ApiError(0, "Unreachable", "gone")

    assert await gate.asks(a_token()) == WORKER


async def test_a_job_that_this_operator_does_not_know_is_not_its_callers_fault() -> None:
    gate = Gate(a_pod())
    gate.namespaces.clear()

    assert await gate.asks(a_token()) == WORKER


async def test_a_pod_that_is_ending_may_speak_until_its_grace_is_long_over() -> None:
    pod = a_pod()
    pod["metadata"]["deletionTimestamp"] = "2025-06-15T15:06:40Z"  # noon
    gate = Gate(pod)

    gate.now = NOON + OVERTIME_SECONDS - 1
    assert await gate.asks(a_token()) == WORKER
    gate.now = NOON + OVERTIME_SECONDS + 1
    assert await gate.refuses(a_token()) == (403, "pod ended")


# --- who is not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        (None, 401, "no token"),
        ("", 401, "no token"),
        ("garbage", 401, "not a token"),
        ("a.b.c", 401, "not a token"),
        ("\udcff.\udcff.\udcff", 401, "not a token"),
        (base64.urlsafe_b64encode(b"[" * 5000).decode() + ".e30.e30", 401, "not a token"),
        (f"{part({'alg': 'none', 'kid': 'k1'})}.{part(claims())}.", 401, "not a token"),
        (f"{part({'alg': 'RS256', 'kid': 'k1'})}.{part(claims())}.", 401, "bad signature"),
        (signed_with_the_public_key(), 401, "not a token"),
        (a_token(algorithm="PS256"), 401, "not a token"),
        (a_token(algorithm="RS512"), 401, "not a token"),
        (a_token(OTHER_KEY), 401, "bad signature"),
        (a_token(key_id="k9"), 401, "unknown key"),
        (a_token(key_id=None), 401, "unknown key"),
        (a_token(aud=["another"]), 401, "wrong audience"),
        (a_token(aud=[]), 401, "missing claim"),
        (a_token(aud={"pretrain.dev": 1}), 401, "wrong audience"),
        (a_token(aud=None), 401, "missing claim"),
        (a_token(iss="https://another"), 401, "wrong issuer"),
        (a_token(iss=None), 401, "missing claim"),
        (a_token(sub=None), 401, "missing claim"),
        (a_token(exp=None), 401, "missing claim"),
        (a_token(exp=[]), 401, "missing claim"),
        (a_token(nbf=None), 401, "missing claim"),
        (a_token(exp=int(NOON - LEEWAY_SECONDS - 1)), 401, "expired"),
        (a_token(nbf=int(NOON + LEEWAY_SECONDS + 1)), 401, "expired"),
        (a_token(**{"kubernetes.io": None}), 401, "missing claim"),
        (a_token(**{"kubernetes.io": {**BINDING, "pod": {"name": "a-pod"}}}), 401, "missing claim"),
        (a_token(**{"kubernetes.io": {"namespace": NAMESPACE}}), 401, "not bound to a pod"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_token_that_is_not_in_order_is_refused(token: str | None, status: int, reason: str) -> None:
    assert await Gate(a_pod()).refuses(token) == (status, reason)


async def test_a_changed_token_is_refused() -> None:
    head, _, signature = a_token().split(".")

    assert await Gate(a_pod()).refuses(f"{head}.{part(claims(sub='another'))}.{signature}") == (401, "bad signature")


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (None, "no such pod"),
        (a_pod(uid="another"), "no such pod"),
        (a_pod(phase="Failed"), "pod ended"),
        (a_pod(phase="Succeeded"), "pod ended"),
        (a_pod(job_uid="another", owner="another"), "another job"),
        (a_pod(job_uid="another"), "not a worker"),
        (a_pod(owner="another"), "not a worker"),
        (a_pod(job_uid=None), "not a worker"),
        (a_pod(slot=None), "not a worker"),
        (a_pod(attempt="x"), "not a worker"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("watched", [True, False])
async def test_a_token_of_a_pod_that_is_no_live_worker_of_the_job_is_refused(
    pod: dict | None, reason: str, watched: bool
) -> None:
    assert await Gate(pod, watched).refuses(a_token()) == (403, reason)


async def test_a_pod_with_the_jobs_labels_in_another_namespace_is_refused() -> None:
    gate = Gate(a_pod())
    gate.namespaces[JOB] = "where the job is"

    assert await gate.refuses(a_token()) == (403, "another job")


async def test_a_pod_where_the_operator_may_not_look_is_refused() -> None:
    gate = Gate()
    await gate.asks(a_token())
    gate.api.error = ApiError(403, "Forbidden", "no")

    elsewhere = {"namespace": "x", "pod": {"name": "p", "uid": "u"}}
    assert await gate.refuses(a_token(**{"kubernetes.io": elsewhere})) == (403, "not a worker")


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_nothing_at_all_makes_it_fail(text: str) -> None:
    async def ask() -> tuple[int, str]:
        return await Gate(a_pod()).refuses(text)

    assert asyncio.run(ask())[0] == 401


# --- what is told -----------------------------------------------------------------------------------------------------


async def test_the_answers_do_not_tell_what_was_wrong() -> None:
    gate = Gate(a_pod())
    bad = [None, "x", a_token(OTHER_KEY), a_token(aud=["x"]), a_token(key_id="k9"), a_token(exp=1)]
    strange = [("a-pod", "other"), ("no-pod", "u")]

    answers = {await gate.asks(token) for token in bad}
    others = {
        await gate.asks(a_token(**{"kubernetes.io": {"namespace": NAMESPACE, "pod": {"name": name, "uid": uid}}}))
        for name, uid in strange
    }

    assert answers == {AuthenticationFailure(401, "a valid token is required")}
    assert others == {AuthenticationFailure(403, "the token does not belong to a live worker of this job")}
    assert len(gate.reasons) == len(bad) + len(strange)


# --- the API server's keys --------------------------------------------------------------------------------------------


async def test_the_keys_are_asked_for_once() -> None:
    gate = Gate(a_pod())

    answers = await asyncio.gather(*(gate.asks(a_token()) for _ in range(20)))

    assert answers == [WORKER] * 20
    assert len(gate.api.asked) == 2


async def test_tokens_with_unknown_keys_make_few_calls() -> None:
    gate = Gate(a_pod())
    for number in range(50):
        await asyncio.gather(*(gate.asks(a_token(key_id=f"made-up-{number}-{other}")) for other in range(3)))
        gate.now += PAUSE_SECONDS / 25

    assert len(gate.api.asked) <= 2 * 3


async def test_a_new_key_is_taken_up() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.keys = [published(OTHER_KEY, "k2")]
    gate.now += PAUSE_SECONDS

    assert await gate.asks(a_token(OTHER_KEY, "k2")) == WORKER
    assert await gate.refuses(a_token()) == (401, "unknown key")


async def test_a_removed_key_is_believed_for_a_short_while_only() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.keys = [published(OTHER_KEY, "k2")]
    gate.now += STALE_SECONDS

    assert await gate.refuses(a_token()) == (401, "unknown key")


async def test_a_replaced_key_of_the_same_name_refuses_what_the_old_one_signed() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.keys = [published(OTHER_KEY)]
    gate.now += STALE_SECONDS

    assert await gate.refuses(a_token()) == (401, "bad signature")


async def test_known_keys_outlive_an_api_server_that_is_away() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.error = ApiError(0, "Unreachable", "gone")
    gate.now += STALE_SECONDS

    assert await gate.asks(a_token()) == WORKER


async def test_a_caller_with_a_known_key_does_not_wait_for_news_that_another_waits_for() -> None:
    gate = Gate(a_pod())
    await gate.asks(a_token())
    gate.api.hangs = True
    gate.now += STALE_SECONDS
    waiting = asyncio.create_task(gate.asks(a_token()))
    while len(gate.api.asked) < 4:
        await asyncio.sleep(0)

    assert await asyncio.wait_for(gate.asks(a_token()), 1) == WORKER
    waiting.cancel()


@pytest.mark.parametrize("answer", ["error", "nonsense"])
async def test_without_keys_a_caller_is_asked_to_try_again_and_can(answer: str) -> None:
    gate = Gate(a_pod())
    if answer == "error":
        gate.api.error = ApiError(0, "Unreachable", "gone")
    else:
        gate.api.keys = None  # type: ignore[assignment]
    assert await gate.refuses(a_token()) == (503, "cannot verify")
    asked = len(gate.api.asked)

    assert await gate.refuses(a_token()) == (503, "cannot verify")
    assert len(gate.api.asked) == asked, "asked again at once"
    gate.api.error, gate.api.keys = None, [published(RSA_KEY)]
    gate.now += PAUSE_SECONDS
    assert await gate.asks(a_token()) == WORKER


async def test_a_pod_that_cannot_be_looked_up_is_asked_to_try_again() -> None:
    gate = Gate(a_pod(), watched=False)
    await gate.asks(a_token())
    gate.api.error = ApiError(0, "Unreachable", "gone")

    assert await gate.refuses(a_token()) == (503, "cannot verify")


async def test_keys_of_other_kinds_are_passed_over() -> None:
    gate = Gate(a_pod())
    secret = {"kty": "oct", "k": "c2VjcmV0" * 8, "kid": "k3"}
    gate.api.keys = [{"kty": "unheard of"}, {**published(RSA_KEY), "kid": 7}, secret, published(RSA_KEY)]

    assert await gate.asks(a_token()) == WORKER
    assert await gate.refuses(jwt.encode(claims(), "secret" * 8, "HS256", {"kid": "k3"})) == (401, "unknown key")


async def test_a_pod_that_is_gone_is_asked_for_once() -> None:
    gate = Gate()
    for _ in range(10):
        assert await gate.refuses(a_token()) == (403, "no such pod")

    assert gate.api.asked.count(f"{NAMESPACE}/a-pod") == 1
