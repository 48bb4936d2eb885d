"""Bills of materials list what the images and the chart consist of."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from support.documents import ROOT
from tools.sbom import CHART, IMAGES, chart_bom, image_bom, locked, rendered

BASE = f"python:3.11-slim-bookworm@sha256:{'1' * 64}"
TORCH = ROOT / "requirements" / "torch-cpu.txt"


def bom_of(image: str, torch: Path = TORCH) -> dict[str, Any]:
    return json.loads(rendered(image_bom(image, torch, BASE)))


def libraries(bom: dict[str, Any]) -> dict[str, str]:
    return {it["name"]: it["version"] for it in bom["components"] if it["type"] == "library"}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_s_bill_lists_every_locked_package_with_its_digests(image: str) -> None:
    locks = [ROOT / "requirements" / f"{image}.txt", *([TORCH] if image == "trainer" else [])]
    packages = {it.name: it for lock in locks for it in locked(lock)}
    listed = {it["name"]: it for it in bom_of(image)["components"]}

    assert packages
    for name, package in packages.items():
        (files,) = listed[name]["externalReferences"]
        assert listed[name]["version"] == package.version
        assert {it["content"] for it in files["hashes"]} == set(package.digests)
    others = {name for name in listed.keys() - packages.keys() if listed[name]["type"] == "library"}
    assert others == {f"pretrain-{package}" for package in IMAGES[image]}


@pytest.mark.parametrize("image", IMAGES)
def test_the_versions_of_a_bill_are_those_that_the_tests_run_with(image: str) -> None:
    versions = libraries(bom_of(image))
    installed = {name: metadata.version(name) for name in versions if name != "torch"}

    assert {name: it for name, it in versions.items() if name != "torch"} == installed


@pytest.mark.parametrize("image", IMAGES)
def test_the_packages_of_a_bill_are_those_that_the_dockerfile_copies(image: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stage = dockerfile.partition(f"AS {image}-code")[2].partition("\nFROM ")[0]

    assert tuple(re.findall(r"^COPY (\w+) \1$", stage, re.MULTILINE)) == IMAGES[image]


def test_the_build_of_torch_decides_what_else_the_trainer_contains() -> None:
    cpu = libraries(bom_of("trainer"))
    index = libraries(bom_of("trainer", ROOT / "requirements" / "torch.txt"))

    assert cpu["torch"] == f"{index['torch']}+cpu"
    assert not any(name.startswith("nvidia-") for name in cpu)
    assert any(name.startswith("nvidia-") for name in index)


def test_a_bill_names_the_base_image_by_digest() -> None:
    (base,) = [it for it in bom_of("operator")["components"] if it["type"] == "container"]

    assert (base["name"], base["version"]) == ("python", "3.11-slim-bookworm")
    assert base["hashes"] == [{"alg": "SHA-256", "content": "1" * 64}]


def test_a_bill_says_which_package_requires_which() -> None:
    requires = {it["ref"].partition("==")[0]: it.get("dependsOn", []) for it in bom_of("operator")["dependencies"]}
    names = {name: {ref.partition("==")[0] for ref in refs} for name, refs in requires.items()}

    assert {"pretrain-api", "aiohttp", "kubernetes"} <= names["pretrain-operator"]
    assert "cryptography" in names["pyjwt"], "an extra's requirement"
    assert "colorama" not in names["structlog"], "another platform's requirement"


def test_the_chart_s_bill_has_every_file_by_digest_and_the_images_that_it_runs() -> None:
    components = json.loads(rendered(chart_bom()))["components"]
    files = {it["name"]: it["hashes"][0]["content"] for it in components if it["type"] == "file"}
    images = {f"{it['name']}:{it['version']}" for it in components if it["type"] == "container"}
    version = metadata.version("pretrain-operator")

    assert files == {
        path.relative_to(CHART).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in CHART.rglob("*")
        if path.is_file()
    }
    assert images == {f"pretrain-operator:{version}", f"pretrain-trainer:{version}"}


def test_bills_are_valid_and_the_same_from_every_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.sbom", "--torch", str(TORCH), "--base-image", BASE]
    for folder in ("one", "two"):
        subprocess.run([*command, str(tmp_path / folder)], cwd=ROOT, check=True, capture_output=True)
    texts = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}

    assert texts.keys() == {f"pretrain-{it}.cdx.json" for it in ("operator", "trainer", "operator-chart")}
    assert texts == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}
    for text in texts.values():
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
