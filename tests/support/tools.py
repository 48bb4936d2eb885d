"""External tools of the tests: one fixture each, one reason to skip each, one line each at the end of a run.

A pytest plugin. A tool is looked for on PATH, then in the cache that `make tools` fills, then in the prebuilt cluster
(PRETRAIN_TEST_CLUSTER). With CI=true a skip for any reason but `ALLOWED_IN_CI` fails the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from support.debian import unpacked_package
from tools.fetch_tools import cache_folder, prebuilt_cluster

ALLOWED_IN_CI: tuple[str, ...] = ()
"""Reasons for which a test may be skipped on a machine that has everything, as the summary shows them."""
FETCHED = "`make tools` fetches it"

Programs = Mapping[str, Path]


@dataclass(frozen=True)
class Tool:
    """Something from outside that tests need: all of its programs, from one place."""

    name: str
    tests: str
    """Noun of the tests that need it."""
    remedy: str
    find: Callable[[], Programs | None]

    @property
    def reason(self) -> str:
        """The one reason with which those tests are skipped."""
        return f"no {self.name}; {self.remedy}"


def _search_paths() -> Iterator[str]:
    yield os.environ.get("PATH", os.defpath)
    yield str(cache_folder(os.environ) / "bin")
    unpack = prebuilt_cluster(os.environ) / "tools"
    if unpack.exists():
        yield subprocess.run([unpack], check=True, capture_output=True, text=True, timeout=240).stdout.strip()


def _programs(*names: str) -> Callable[[], Programs | None]:
    """Finder of programs that stand together in one place, so that their versions fit."""

    def find() -> Programs | None:
        for path in _search_paths():
            found = {name: shutil.which(name, path=path) for name in names}
            there = {name: Path(where) for name, where in found.items() if where}
            if len(there) == len(names):
                return there
        return None

    return find


def _first_of(*names: str) -> Programs | None:
    """Return the first of some alternatives on PATH."""
    found = next(filter(None, map(shutil.which, names)), None)
    return {"program": Path(found)} if found else None


def _compiler() -> Programs | None:
    from pretrain_trainer.models.compile import COMPILERS  # imports torch

    return _first_of(*COMPILERS)


def _browser() -> Programs | None:
    return _first_of("chromium", "chromium-browser", "google-chrome")


def _prometheus() -> Programs | None:
    on_path = _programs("prometheus", "promtool")()
    folder = None if on_path else unpacked_package("prometheus")
    return {name: folder / "usr" / "bin" / name for name in ("prometheus", "promtool")} if folder else on_path


def _namespaces() -> Programs | None:
    """Try what `pods` does: namespaces of a process, and a bridge in its network."""
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    if sys.platform != "linux" or os.geteuid() != 0 or not unshare or not ip:
        return None
    separate = [unshare, "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc", "--net"]
    tried = subprocess.run([*separate, ip, "link", "add", "pods0", "type", "bridge"], capture_output=True)
    return {"unshare": Path(unshare), "ip": Path(ip)} if tried.returncode == 0 else None


def _cluster() -> Programs | None:
    """Return the script of a prebuilt cluster, or what `examples/kind/up` needs: docker and, also fetched, the rest."""
    up = prebuilt_cluster(os.environ) / "up"
    if up.exists():
        return {"up": up}
    found = {name: _programs(name)() for name in ("docker", "kind", "kubectl", "helm")}
    return {name: it[name] for name, it in found.items() if it} if all(found.values()) else None


API_SERVER = Tool("API server", "API server tests", FETCHED, _programs("kube-apiserver", "etcd", "kubectl"))
CLUSTER = Tool("cluster", "end-to-end tests", "install docker and run `make tools`", _cluster)
COMPILER = Tool("C++ compiler", "tests of compiled blocks", "install g++", _compiler)
CHROMIUM = Tool("Chromium", "browser tests", "install chromium", _browser)
HELM = Tool("helm", "chart tests", FETCHED, _programs("helm"))
NAMESPACES = Tool("namespaces", "tests in pods' namespaces", "run them as root on Linux, with iproute2", _namespaces)
PROMETHEUS = Tool("Prometheus", "tests of rules and dashboards", "install prometheus", _prometheus)
S3 = Tool("S3 server", "S3 server tests", FETCHED, _programs("versitygw"))
TOOLS = (API_SERVER, CLUSTER, COMPILER, CHROMIUM, HELM, NAMESPACES, PROMETHEUS, S3)


@cache
def find(tool: Tool) -> Programs | None:
    """Return the programs of a tool by name; None where there is no such tool."""
    return tool.find()


def require(tool: Tool) -> Programs:
    """Return the programs of a tool by name, or skip the test."""
    found = find(tool)
    if found is None:
        pytest.skip(tool.reason)
    return found


@pytest.fixture(scope="session")
def cpp_compiler() -> Path:
    """A C++ compiler, which inductor's code needs."""
    return require(COMPILER)["program"]


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A browser without a screen."""
    return require(CHROMIUM)["program"]


@pytest.fixture(scope="session")
def helm() -> Path:
    """The chart's renderer."""
    return require(HELM)["helm"]


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Namespaces of Linux, as a pod has them."""
    require(NAMESPACES)


@pytest.fixture(scope="session")
def api_server_programs() -> Programs:
    """Programs kube-apiserver, etcd and kubectl."""
    return require(API_SERVER)


@pytest.fixture(scope="session")
def s3_program() -> Path:
    """An S3 server over a folder."""
    return require(S3)["versitygw"]


@pytest.fixture(scope="session")
def prometheus_programs() -> Programs:
    """Programs prometheus and promtool."""
    return require(PROMETHEUS)


@pytest.fixture(scope="session")
def cluster_programs() -> Programs:
    """What starts a kind cluster."""
    return require(CLUSTER)


class SkipSummary:
    """Counts skipped tests by reason, over all processes of a run."""

    def __init__(self, allowed: tuple[str, ...] | None) -> None:
        self._allowed = allowed
        self._skipped: list[tuple[str, str]] = []

    @property
    def unexpected(self) -> list[tuple[str, str]]:
        """Tests, and why each was skipped, that must not be skipped in CI."""
        return [it for it in self._skipped if it[1] not in self._allowed] if self._allowed is not None else []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            self._skipped.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        nouns = {tool.reason: tool.tests for tool in TOOLS}
        counts = Counter(reason for _, reason in self._skipped)
        if counts:
            terminalreporter.section("skipped")
        for reason, count in sorted(counts.items()):
            noun = nouns.get(reason, "tests")
            terminalreporter.write_line(
                f"{count} {noun.replace('tests', 'test') if count == 1 else noun} skipped: {reason}"
            )
        for test, reason in self.unexpected:
            terminalreporter.write_line(
                f"FAILED {test}: skipped in CI, which allows no skip for this: {reason}", red=True
            )


def pytest_configure(config: pytest.Config) -> None:
    """Summarise where the report is written: in the main process of pytest-xdist only."""
    if not hasattr(config, "workerinput"):
        in_ci = os.environ.get("CI", "").lower() == "true"
        config.pluginmanager.register(SkipSummary(ALLOWED_IN_CI if in_ci else None), "skip-summary")
