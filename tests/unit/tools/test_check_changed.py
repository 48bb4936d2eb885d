"""`make check`: which unit tests run for which change."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.check_changed import changed_files, unit_tests_of

FILES = {
    "tests/unit/test_store.py": "from pretrain_store.open import probe\nfrom support.worlds import a_world\n",
    "tests/unit/test_chart.py": 'CHART = ROOT / "charts" / "pretrain-operator"\n',
    "tests/unit/agent/test_worker.py": "from pretrain_agent.worker import main\n",
    "tests/unit/operator/test_plan.py": "from pretrain_agent.worker import main\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("store/src/pretrain_store/open.py", ["tests/unit/test_store.py"]),
        ("agent/src/pretrain_agent/worker.py", ["tests/unit/agent/test_worker.py"]),
        ("charts/pretrain-operator/values.yaml", ["tests/unit/test_chart.py"]),
        ("tests/support/worlds.py", ["tests/unit/test_store.py"]),
        ("tests/unit/agent/test_worker.py", ["tests/unit/agent/test_worker.py"]),
        ("tests/unit/golden/defaults.yaml", sorted(FILES)),
        ("Makefile", []),
    ],
)
def test_a_change_runs_the_tests_that_it_concerns(root: Path, changed: str, tests: list[str]) -> None:
    assert unit_tests_of([Path(changed)], root) == [Path(test) for test in sorted(tests)]


def test_changes_are_those_since_the_branch_left_main_and_files_that_are_new(root: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "--initial-branch=main")
    git("add", ".")
    git("commit", "-m", "first")
    git("switch", "-c", "topic")
    (root / "committed.py").write_text("")
    git("add", ".")
    git("commit", "-m", "second")
    (root / "tests/unit/test_chart.py").write_text("changed")
    (root / "untracked.py").write_text("")

    assert changed_files(root) == [Path("committed.py"), Path("tests/unit/test_chart.py"), Path("untracked.py")]
