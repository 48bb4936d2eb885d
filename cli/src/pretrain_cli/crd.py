"""`python -m pretrain_cli.crd [--check]`: write crds/ from the models, or fail when the file has drifted from them."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from pathlib import Path

from ruamel.yaml import YAML

from pretrain_api.crd import custom_resource_definition

CRD_FILE = Path("crds/pretrain.dev_pretrainjobs.yaml")
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


def drift(path: Path) -> str:
    """A unified diff from the file to what it should be; empty when it is up to date."""
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    return "".join(
        difflib.unified_diff(
            found.splitlines(True), rendered().splitlines(True), str(path), "generated from the models"
        )
    )


def main() -> int:
    """Write the file, or with --check print the diff and return 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m pretrain_cli.crd", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print the diff and exit 1 instead of writing")
    parser.add_argument("--file", type=Path, default=CRD_FILE, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.check:
        diff = drift(arguments.file)
        sys.stdout.write(diff)
        return 1 if diff else 0
    arguments.file.write_text(rendered(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
