"""`python -m tools.crd [--check]`: write the CRD and its field tables, or fail if they have drifted from the models."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tools import generated
from tools.crd import field_tables as fields
from tools.crd.definition import custom_resource_definition

_HEADER = "# Generated from api/src/pretrain_api/spec/job.py by `python -m tools.crd`: do not edit.\n"


def rendered() -> str:
    """Render the CustomResourceDefinition as YAML, deterministically."""
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
    """Return the drift of the files below `root`; empty if they are up to date."""
    return generated.drift(root, _made())


def main() -> int:
    """Write the files, or with --check report their drift."""
    return generated.write_or_check("tools.crd.__main__", __doc__, Path(), _made(), drift)


def _made() -> dict[Path, str]:
    return {path: make() for path, make in MADE.items()}


if __name__ == "__main__":
    sys.exit(main())
