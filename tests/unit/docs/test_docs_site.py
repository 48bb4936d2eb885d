"""The documentation site: built strictly, complete, and without a request to another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from support.documents import ROOT
from tools.docs.__main__ import drift, rendered

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
HINTS = {"canonical", "next", "prev", "alternate"}
"""Relations of a `link` that load nothing."""


class Loads(HTMLParser):
    """What a browser loads with a page by itself."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and not HINTS & set((values.get("rel") or "").split()):
            self.addresses.append(values.get("href") or "")
        if tag in LOADING:
            self.addresses.append(values.get(LOADING[tag]) or "")
        if "mermaid" in (values.get("class") or "").split():
            self.addresses.append("https://mermaid, which the theme loads from another host")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    loads = {str(page.relative_to(site)): Loads(page).addresses for page in pages}

    assert len(pages) > 50
    assert sum(map(len, loads.values())) > len(pages)
    assert [(page, it) for page, them in loads.items() for it in them if re.match(r"(?i)([a-z]+:)?//", it)] == []


def test_no_style_sheet_or_picture_loads_anything_from_another_host(site: Path) -> None:
    files = [*site.rglob("*.css"), *(site / "images").rglob("*.svg")]
    loads = {
        path.name: re.findall(r"(?:url\(|@import\s+|href=)[\"']?((?:https?:)?//[^\"')]+)", path.read_text())
        for path in files
    }

    assert {name: found for name, found in loads.items() if found} == {}
    assert not any("<script" in path.read_text() for path in (site / "images").rglob("*.svg"))


def test_the_page_of_each_alert_is_where_the_alert_says(site: Path) -> None:
    groups = YAML(typ="safe", pure=True).load((ROOT / "charts/pretrain-operator/alerts.yaml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    pages = {rule["annotations"]["runbook_url"].partition("/docs/")[2] for rule in alerts}

    assert pages
    assert [page for page in pages if not (site / page).exists()] == []
    assert [page for page in pages if not (site / page).with_suffix(".html").exists()] == []


def test_generated_pages_and_diagrams_are_up_to_date() -> None:
    assert drift(ROOT) == ""


def test_drift_is_found_and_so_is_a_stray_diagram(tmp_path: Path) -> None:
    for path, text in rendered().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert drift(tmp_path) == ""

    (tmp_path / "docs/images/stray.svg").write_text("<svg/>\n")
    (tmp_path / "docs/reference/cli.md").write_text("edited\n")

    assert "stray.svg" in drift(tmp_path)
    assert "-edited" in drift(tmp_path)


def test_every_message_and_command_has_a_section(site: Path) -> None:
    protocol = (site / "reference/protocol.html").read_text()
    commands = (site / "reference/cli.html").read_text()

    assert all(f"<code>{kind}</code>" in protocol for kind in ("hello", "generation", "step", "rolled_back", "failed"))
    assert all(f"<code>pretrain {name}</code>" in commands for name in ("run", "validate", "export", "profile"))
