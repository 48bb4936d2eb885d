"""The machine that README asks for is the one that `.ci/bare` makes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_readme_names_the_packages_of_the_bare_container_and_no_other() -> None:
    installed = re.search(r"--no-install-recommends ([\w -]+?) >", (ROOT / ".ci" / "bare").read_text())
    named = re.search(r"on Debian 12 the packages\s+([\w\s,-]+?), and nothing else", (ROOT / "README.md").read_text())

    assert installed is not None
    assert named is not None
    assert sorted(re.findall(r"[\w-]+", named[1].replace(" and ", " "))) == sorted(installed[1].split())
