"""The inner loop: style, types, import rules, and the unit tests of the packages that changed since main.

python tools/check_changed.py           # run all of it
python tools/check_changed.py --list    # print the test files that would run
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNIT = Path("tests") / "unit"
BRANCHES = ("origin/main", "main")
MOST_PROCESSES = 8


def changed_files(root: Path) -> list[Path]:
    """Return what differs from the point where the branch left main, new files included."""
    bases = (_git(root, "merge-base", "HEAD", branch) for branch in BRANCHES)
    base = next((lines[0] for lines in bases if lines), "HEAD")
    tracked = _git(root, "diff", "--name-only", base)
    return sorted({Path(name) for name in tracked + _git(root, "ls-files", "--others", "--exclude-standard")})


def _git(root: Path, *arguments: str) -> list[str]:
    ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return ran.stdout.splitlines() if ran.returncode == 0 else []


def unit_tests_of(changed: Iterable[Path], root: Path) -> list[Path]:
    """Return the unit tests to run for these files.

    A changed test runs. A changed package runs the tests in its folder of tests/unit, or those that import it where
    it has no such folder. A changed module of the tests runs what imports it; other files what names their folder.
    """
    texts = {path.relative_to(root): path.read_text() for path in sorted((root / UNIT).rglob("test_*.py"))}
    chosen: set[Path] = set()
    for file in changed:
        if file in texts:
            chosen.add(file)
        elif file.parts[0] == "tests":
            chosen |= (
                _matching(texts, rf"^(from|import) [\w.]*\b{re.escape(file.stem)}\b")
                if file.suffix == ".py"
                else set(texts)
            )
        elif len(file.parts) > 2 and file.parts[1] == "src":
            beside = {test for test in texts if test.parent.is_relative_to(UNIT / file.parts[0])}
            chosen |= beside or _matching(texts, rf"^(from|import) {re.escape(file.parts[2])}\b")
        elif len(file.parts) > 1:
            chosen |= _matching(
                texts, rf"[\"']{re.escape(file.parts[0])}\b|^(from|import) {re.escape(file.parts[0])}\b"
            )
    return sorted(chosen)


def _matching(texts: dict[Path, str], pattern: str) -> set[Path]:
    return {test for test, text in texts.items() if re.search(pattern, text, re.MULTILINE)}


def main(arguments: Sequence[str]) -> int:
    """Run the checks side by side, print what fails, and return 1 if anything does."""
    tests = [str(test) for test in unit_tests_of(changed_files(ROOT), ROOT)]
    if "--list" in arguments:
        print("\n".join(tests))
        return 0
    python, programs = sys.executable, Path(sys.executable).parent
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    checks: list[list[str | Path]] = [
        [programs / "ruff", "format", "--check", "--quiet", "."],
        [programs / "ruff", "check", "--quiet", "."],
        [programs / "lint-imports", "--no-logo"],
        [programs / "basedpyright"],
    ]
    if tests:
        checks.append([python, "-m", "pytest", "-q", "-m", "not slow", "-n", str(processes), *tests])
    begin = time.monotonic()
    running = [
        subprocess.Popen(check, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for check in checks
    ]
    outputs = [check.communicate()[0] for check in running]
    failed = [output for check, output in zip(running, outputs, strict=True) if check.returncode]
    print("\n".join(failed) or f"style, types, import rules and {len(tests)} files of unit tests pass", end=" ")
    print(f"({time.monotonic() - begin:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
