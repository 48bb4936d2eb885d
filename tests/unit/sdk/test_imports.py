"""The SDK is light: a training program imports it before it decides on anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "aiohttp", "boto3", "botocore", "numpy")


@pytest.mark.parametrize("module", ["pretrain_sdk", "pretrain_sdk.rank_link", "pretrain_sdk.scratch"])
def test_importing_the_sdk_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == ""


def test_the_documented_names_are_the_packages_own() -> None:
    import pretrain_sdk

    assert sorted(pretrain_sdk.__all__) == ["AgentLink", "Scratch", "SocketLink", "UnattendedLink", "connect"]
    assert all(hasattr(pretrain_sdk, name) for name in pretrain_sdk.__all__)
