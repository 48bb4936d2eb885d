"""Hooks of the documentation site: files of the repository outside docs/ that pages link to become part of the site."""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "charts/pretrain-operator/README.md": "chart.md",
}
"""Pages of the site that are outside docs/, with their paths in the site."""
FILES = (
    "LICENSE",
    "charts/pretrain-operator/values.yaml",
    "examples/evaluation_hook.py",
    "examples/kind/job.yaml",
    "examples/pretrainjob.yaml",
    "examples/quickstart.yaml",
    "examples/training_callback.py",
)
"""Files that are copied to the same path of the site."""
FOLDERS = {"Runbooks": "runbooks", "Decisions": "decisions"}
"""Sections of the navigation that list every page of a folder."""
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the navigation that are folders."""
    for entry in config.nav or []:
        for name, folder in FOLDERS.items():
            if isinstance(entry, dict) and name in entry:
                pages = sorted(Path(config.docs_dir, folder).glob("*.md"), key=lambda it: (it.name != "README.md", it))
                entry[name] = [f"{folder}/{page.name}" for page in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    for name, path in {**PAGES, **{name: name for name in FILES}}.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    source = page.file.src_uri
    here = posixpath.dirname(source)
    origins = {path: name for name, path in PAGES.items()}
    folder = posixpath.dirname(origins.get(source, f"docs/{source}"))

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        return posixpath.relpath(PAGES.get(target, target.removeprefix("docs/")), here or ".")

    return _LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the runbooks' sources: alerts name them by their path in the repository."""
    for page in Path(config.docs_dir, "runbooks").glob("*.md"):
        shutil.copyfile(page, Path(config.site_dir, "runbooks", page.name))
