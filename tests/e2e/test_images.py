"""The images contain what their bills of materials list, and nothing else."""

from __future__ import annotations

import json
import subprocess

import pytest
from packaging.utils import canonicalize_name

from support.documents import ROOT
from support.kubernetes.kind import OPERATOR_IMAGE, TRAINER_IMAGE, Cluster
from tools.sbom import image_bom

INSTALLED = (
    "import json; from importlib.metadata import *; print(json.dumps({d.name: d.version for d in distributions()}))"
)


def installed(image: str) -> dict[str, str]:
    """Return the Python distributions of an image with their versions."""
    command = ["docker", "run", "--rm", "--network=none", "--entrypoint=/opt/venv/bin/python", image, "-c", INSTALLED]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {canonicalize_name(name): version for name, version in found.items()}


@pytest.mark.core
@pytest.mark.parametrize(("image", "name"), [("operator", OPERATOR_IMAGE), ("trainer", TRAINER_IMAGE)])
def test_an_image_contains_what_its_bill_of_materials_lists(cluster: Cluster, image: str, name: str) -> None:
    found = installed(name)
    torch = "torch-cpu.txt" if found.get("torch", "").endswith("+cpu") else "torch.txt"

    components = image_bom(image, ROOT / "requirements" / torch, "python:3.11-slim-bookworm").components

    assert found == {it.name: it.version for it in components if it.type == "library"}
