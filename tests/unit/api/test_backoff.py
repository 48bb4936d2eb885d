import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_api.backoff import Backoff, Retries

SECONDS = st.floats(min_value=1e-3, max_value=1e3)


@st.composite
def backoffs(draw: st.DrawFn) -> Backoff:
    first = draw(SECONDS)
    return Backoff(
        first=first,
        factor=draw(st.floats(min_value=1, max_value=16)),
        most=first * draw(st.floats(min_value=1, max_value=1e4)),
        jitter=draw(st.floats(min_value=0, max_value=1)),
    )


ATTEMPTS = st.integers(min_value=1, max_value=10**9)
DRAWS = st.floats(min_value=0, max_value=1, exclude_max=True)


def test_delays_grow_by_the_factor_up_to_the_most() -> None:
    backoff = Backoff(first=1, factor=2, most=10, jitter=0)

    delays = [backoff.delay(attempt, random=lambda: 0.7) for attempt in range(1, 7)]

    assert delays == [1, 2, 4, 8, 10, 10]


@given(backoffs(), ATTEMPTS, DRAWS)
def test_a_delay_is_within_the_jitter_of_the_longest_one(backoff: Backoff, attempt: int, drawn: float) -> None:
    delay, longest = backoff.delay(attempt, lambda: drawn), backoff.longest(attempt)

    assert longest * (1 - backoff.jitter) <= delay <= longest <= backoff.most


@given(backoffs(), ATTEMPTS)
def test_the_longest_delay_never_shrinks_and_is_finite(backoff: Backoff, attempt: int) -> None:
    assert backoff.first <= backoff.longest(attempt) <= backoff.longest(attempt + 1) < math.inf


@given(backoffs(), ATTEMPTS, DRAWS)
def test_without_jitter_the_random_source_is_not_asked(backoff: Backoff, attempt: int, drawn: float) -> None:
    def refuse() -> float:
        raise AssertionError("asked")

    steady = Backoff(backoff.first, backoff.factor, backoff.most, jitter=0)

    assert steady.delay(attempt, refuse) == steady.longest(attempt)


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
def test_full_jitter_reaches_from_zero_to_the_longest_delay(drawn: float) -> None:
    backoff = Backoff(first=2, factor=2, most=60, jitter=1)

    assert backoff.delay(3, lambda: drawn) == pytest.approx(8 * (1 - drawn))


@pytest.mark.parametrize(
    ("first", "factor", "most", "jitter"), [(0, 2, 10, 0), (2, 2, 1, 0), (1, 0.5, 10, 0), (1, 2, 10, 1.5)]
)
def test_a_schedule_that_cannot_be_is_refused(first: float, factor: float, most: float, jitter: float) -> None:
    with pytest.raises(ValueError, match="a backoff needs"):
        Backoff(first, factor, most, jitter)


def test_retries_count_errors_in_a_row() -> None:
    retries = Retries(Backoff(first=1.0, factor=2.0, most=60.0, jitter=0.0), lambda: 0.0)

    assert [retries.delay(), retries.delay(), retries.delay()] == [1.0, 2.0, 4.0]
    retries.succeeded()
    assert retries.delay() == 1.0


def test_the_server_may_ask_for_a_longer_delay() -> None:
    retries = Retries(Backoff(first=1.0, factor=2.0, most=60.0, jitter=0.0), lambda: 0.0)

    assert [retries.delay(at_least=30.0), retries.delay(at_least=0.5)] == [30.0, 2.0]
