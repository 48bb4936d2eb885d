"""`python -m pretrain_cli.crd [--check]`: write what follows from the models, or fail when it has drifted from them."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from pathlib import Path

from ruamel.yaml import YAML

from pretrain_api.crd import custom_resource_definition
from pretrain_cli import fields

_HEADER = "# Generated from api/src/pretrain_api/job.py by `python -m pretrain_cli.crd`: change that, not this.\n"


def rendered() -> str:
    """The CustomResourceDefinition as YAML text, the same for the same models."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(custom_resource_definition(), stream)
    return _HEADER + stream.getvalue()


MADE = {
    Path("crds/pretrain.dev_pretrainjobs.yaml"): rendered,
    Path("charts/pretrain-operator/files/crd.yaml"): rendered,
    Path("docs/pretrainjob.md"): fields.text,
}


def drift(root: Path) -> str:
    """A unified diff from the files to what they should be; empty when they are up to date."""
    diffs: list[str] = []
    for path, make in MADE.items():
        found = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
        wanted = make().splitlines(True)
        diffs += difflib.unified_diff(found.splitlines(True), wanted, str(path), "generated from the models")
    return "".join(diffs)


def main() -> int:
    """Write the files, or with --check print the diff and return 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m pretrain_cli.crd", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print the diff and exit 1 instead of writing")
    if parser.parse_args().check:
        diff = drift(Path())
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, make in MADE.items():
        path.write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
