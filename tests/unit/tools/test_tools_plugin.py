"""How a run ends that lacks tools: one line for each group of tests, and in CI an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.tools import CLUSTER, HELM, S3

ROOT = Path(__file__).parents[3]
SUITE = """
import pytest

@pytest.mark.parametrize("chart", range(3))
def test_a_chart(helm, chart):
    pass

def test_a_server(s3_program):
    pass

def test_something_else():
    pytest.skip("it is Sunday")

@pytest.mark.xfail(reason="known")
def test_a_known_failure():
    assert False
"""


def run(folder: Path, *options: str, suite: str = SUITE, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a suite with the plugin, on a machine that has no tools."""
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p support.tools -p no:cacheprovider -rfExX\n")
    bare = {
        "PATH": str(folder),
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT))),
        "PRETRAIN_TEST_CLUSTER": str(folder / "absent"),
    }
    command = [sys.executable, "-m", "pytest", *options, "test_suite.py"]
    return subprocess.run(command, cwd=folder, env=bare | environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_each_tool_that_is_missing_has_one_line_with_the_number_of_its_tests(
    tmp_path: Path, processes: tuple[str, ...]
) -> None:
    ran = run(tmp_path, *processes)

    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 chart tests skipped: no helm; `make tools` fetches it" in lines
    assert "1 S3 server test skipped: no S3 server; `make tools` fetches it" in lines
    assert "1 test skipped: it is Sunday" in lines
    assert not any(line.startswith("SKIPPED") for line in lines)
    assert any(line.startswith("XFAIL") for line in lines)


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_in_ci_an_unexpected_skip_fails_the_run_and_is_named(tmp_path: Path, processes: tuple[str, ...]) -> None:
    ran = run(tmp_path, *processes, CI="true")

    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "FAILED test_suite.py::test_something_else: skipped in CI" in ran.stdout
    assert "FAILED test_suite.py::test_a_chart[2]: skipped in CI" in ran.stdout


def test_in_ci_a_run_without_skips_passes(tmp_path: Path) -> None:
    ran = run(tmp_path, suite="def test_something(): pass", CI="true")

    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_fetched_program_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = tmp_path / "pretrain-operator" / "tools" / "bin" / "helm"
    fetched.parent.mkdir(parents=True)
    fetched.write_text("#!/bin/sh\n")
    fetched.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PRETRAIN_TEST_CLUSTER", str(tmp_path / "absent"))

    assert HELM.find() == {"helm": fetched}
    assert S3.find() is None


def test_a_cluster_takes_docker_from_the_path_and_the_rest_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = tmp_path / "pretrain-operator" / "tools" / "bin"
    fetched.mkdir(parents=True)
    for program in (tmp_path / "docker", fetched / "kind", fetched / "kubectl", fetched / "helm"):
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PRETRAIN_TEST_CLUSTER", str(tmp_path / "absent"))

    assert CLUSTER.find() == {
        "docker": tmp_path / "docker", "kind": fetched / "kind", "kubectl": fetched / "kubectl",
        "helm": fetched / "helm",
    }  # fmt: skip


def test_a_program_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helm").write_text("#!/bin/sh\n")
    (tmp_path / "helm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    assert HELM.find() == {"helm": tmp_path / "helm"}
