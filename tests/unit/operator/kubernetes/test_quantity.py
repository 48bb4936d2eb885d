"""Quantities of Kubernetes: the values that Kubernetes gives them, in no time whatever is written."""

from __future__ import annotations

import time
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils import quantity as reference

from pretrain_operator.kubernetes.workload.quantity import parse_quantity


@pytest.mark.parametrize(
    ("written", "value"),
    [("8Gi", 8 * 2**30), ("1.5Ki", 1536), ("500M", 500_000_000), ("1e9", 10**9), ("1E3", 1000), ("2E", 2 * 10**18),
     ("100m", 1), ("1n", 1), (8, 8), (1.5, 2), (".5k", 500), ("+3", 3), ("-1", -1), ("0", 0), ("7Ei", 7 * 2**60)],
)  # fmt: skip
def test_a_quantity_has_kubernetes_value(written: object, value: int) -> None:
    assert parse_quantity(written) == value


@pytest.mark.parametrize(
    "written",
    ["1e99999999", "1e-99999999", "9" * 10_000, "8Ei", "1e19", "", "Gi", "1 Gi", "1Gib", "NaN", "inf", "0x10", "1_0",
     "٣", True, None, [1], {"a": 1}, float("nan"), 10**400],
)  # fmt: skip
def test_what_is_no_quantity_or_too_large_is_refused_in_no_time(written: object) -> None:
    begun = time.thread_time()

    with pytest.raises(ValueError, match="expected"):
        parse_quantity(written)

    assert time.thread_time() - begun < 0.1


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"]))
def test_it_agrees_with_the_client_library(number: int, suffix: str) -> None:
    assert parse_quantity(f"{number}{suffix}") == int(cast(int, reference.parse_quantity(f"{number}{suffix}")))
