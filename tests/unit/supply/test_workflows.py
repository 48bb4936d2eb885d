"""Workflows run pinned code with few rights, and the release publishes what can be verified."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support.documents import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOREIGN = re.compile(r"\$\{\{\s*(github\.(event|head_ref|ref_name)|inputs|vars|secrets|matrix|steps)\b")
"""Expressions whose text is not this file's: in a script they would be executed."""


def loaded(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each step with the name of its job."""
    for name, job in loaded(path)["jobs"].items():
        for step in job["steps"]:
            yield name, step


def release_job(name: str) -> list[dict[str, Any]]:
    return [step for job, step in steps(RELEASE) if job == name]


def script(name: str) -> str:
    """Return the commands of a job of the release."""
    return "\n".join(step.get("run", "") for step in release_job(name))


def using(name: str, action: str) -> list[dict[str, Any]]:
    """Return the inputs of a job's steps with this action."""
    return [step["with"] for step in release_job(name) if step.get("uses", "").startswith(f"{action}@")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda it: it.name)
def test_every_action_is_pinned_by_commit_and_says_which_version_that_is(path: Path) -> None:
    lines = [line.strip(" -") for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]

    assert lines
    assert [it for it in lines if not re.fullmatch(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", it)] == []


def test_a_version_of_an_action_is_one_commit() -> None:
    used = {tuple(it.split("@")) for path in WORKFLOWS for it in re.findall(r"uses: (\S+@\S+)", path.read_text())}

    assert len({action for action, _ in used}) == len(used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda it: it.name)
def test_jobs_have_only_the_rights_that_they_name_and_keep_no_credentials(path: Path) -> None:
    workflow = loaded(path)
    writing = {"id-token": "write", "attestations": "write"}

    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        signs = any("cosign sign" in step.get("run", "") for step in job["steps"])
        assert job["permissions"] == {"contents": "read", **(writing if signs else {})}, name
        assert job["timeout-minutes"] <= 120
    checkouts = [step for _, step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert [it for it in checkouts if it["with"]["persist-credentials"] is not False] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda it: it.name)
def test_no_script_contains_text_from_outside(path: Path) -> None:
    assert [step["run"] for _, step in steps(path) if FOREIGN.search(step.get("run", ""))] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda it: it.name)
def test_scripts_parse_and_use_targets_that_exist(path: Path) -> None:
    scripts = [step["run"] for _, step in steps(path) if "run" in step]
    targets = {it for text in scripts for it in re.findall(r"\bmake (?:--silent )?([a-z0-9-]+)", text)}

    for text in scripts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert targets
    assert targets <= TARGETS


def test_a_release_is_tested_before_anything_is_published() -> None:
    jobs = loaded(RELEASE)["jobs"]

    assert jobs["test"].get("needs") is None
    assert "bash .ci/run" in script("test")
    assert [jobs[name]["needs"] for name in ("materials", "image", "chart")] == ["test", "materials", "image"]


def test_release_images_start_from_the_base_that_is_pinned_by_digest() -> None:
    assert 'PYTHON_IMAGE="$(make --silent base-image)"' in script("image")
    assert loaded(RELEASE)["jobs"]["image"]["strategy"]["matrix"] == {"image": ["operator", "trainer"]}


@pytest.mark.parametrize("job", ["image", "chart"])
def test_what_is_published_has_provenance_a_bill_of_materials_and_a_signature_by_digest(job: str) -> None:
    provenance, materials = using(job, "actions/attest")

    assert "sbom-path" not in provenance
    assert materials["sbom-path"].startswith("dist/sbom/")
    for attested in (provenance, materials):
        assert attested["subject-digest"] == "${{ steps.push.outputs.digest }}"
        assert attested["push-to-registry"] is True
    assert re.search(r'^cosign sign --yes "\$\S+@\$DIGEST"$', script(job), re.MULTILINE)


def test_the_attested_bills_of_materials_are_those_that_make_sbom_writes() -> None:
    attested = {
        it["sbom-path"] for job in ("image", "chart") for it in using(job, "actions/attest") if "sbom-path" in it
    }

    assert "make sbom" in script("materials")
    assert attested == {
        "dist/sbom/pretrain-${{ matrix.image }}.cdx.json",
        "dist/sbom/pretrain-operator-chart.cdx.json",
    }


def test_the_weekly_audit_fails_without_its_service() -> None:
    audit = ROOT / ".github" / "workflows" / "audit.yml"

    assert [step["run"] for _, step in steps(audit) if "run" in step] == ["make audit REQUIRED=1"]
    assert "make --no-print-directory audit\n" in (ROOT / ".ci" / "run").read_text()


def test_dependabot_updates_everything_that_is_pinned() -> None:
    settings = loaded(ROOT / ".github" / "dependabot.yml")
    updated = {it["package-ecosystem"]: ROOT / it["directory"].strip("/") for it in settings["updates"]}

    assert settings["version"] == 2
    assert set(updated) == {"pip", "docker", "github-actions"}
    assert list(updated["pip"].glob("*.in"))
    assert list(updated["docker"].glob("*.Dockerfile"))
    assert updated["github-actions"] == ROOT
