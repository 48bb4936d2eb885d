"""Regular expressions of users: RE2, with limits, whatever is written."""

from __future__ import annotations

import time

import pytest

from pretrain_api.spec.job import Rule
from pretrain_api.spec.patterns import MAX_PROGRAM, MAX_SEARCHED, InvalidPattern, Pattern


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("CUDA.*memory", "RuntimeError: CUDA out of memory", True),
        ("(?i)cuda", "CUDA", True),
        ("^Xid", "NVRM: Xid 79", False),
        (r"Xid \d+$", "NVRM: Xid 79", True),
        ("über", "Das ist über", True),
        ("a", "\ud800a", True),
    ],
)
def test_a_pattern_is_searched_anywhere_in_the_text(pattern: str, text: str, found: bool) -> None:
    assert Pattern(pattern).found_in(text) is found


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", "(.*)*(.*)*(.*)*!", "(a|a)*b", "(a?){90}a{90}$"])
def test_no_pattern_takes_more_than_linear_time(pattern: str) -> None:
    compiled = Pattern(pattern)
    begun = time.thread_time()

    compiled.found_in("a" * 100_000 + "!")

    assert time.thread_time() - begun < 0.5


@pytest.mark.parametrize("pattern", ["(?=a)", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)", "a++", "(?>a)", "a\\Z"])
def test_an_expression_of_python_only_is_refused_with_the_difference(pattern: str) -> None:
    with pytest.raises(ValueError, match="RE2 syntax: no lookaround, no backreferences"):
        Rule.model_validate({"onLog": pattern, "action": "Fail"})


@pytest.mark.parametrize("pattern", [f"a{{{MAX_PROGRAM}}}", "((a{100}){100}){100}", r"\pL{1000}", "a" * 2000, "\ud800"])
def test_an_expression_that_is_too_large_or_no_text_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidPattern):
        Pattern(pattern)


def test_beginning_and_end_of_a_long_text_are_searched() -> None:
    text = "first" + "." * (10 * MAX_SEARCHED) + "last"

    assert Pattern("first").found_in(text)
    assert Pattern("last").found_in(text)
