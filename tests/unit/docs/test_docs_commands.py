"""Commands, field paths and examples of the documents, against the CLI, the Makefile, the CRD and the chart."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.core import TyperCommand

from pretrain_api.spec.job import PretrainJob
from support.crd_paths import JOB, SPEC, problems, schema_at
from support.documents import DOCUMENTS, ROOT, blocks, commands, inline_code, inline_commands, name_of
from tools.docs.cli import commands as cli_commands

CLI = cli_commands()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
VALUES = YAML(typ="safe", pure=True).load((ROOT / "charts/pretrain-operator/values.yaml").read_text())
LABELS = {"pretrain.dev/job", "app.kubernetes.io/name"}
KINDS = {
    "pretrainjob", "pretrainjobs", "pod", "pods", "pods,leases", "leases", "lease", "events", "secret", "namespace",
    "crd", "pretrainjobs,pods",
}  # fmt: skip
VERBS = {
    "apply", "auth", "cordon", "create", "delete", "describe", "drain", "explain", "get", "logs", "patch", "scale",
    "top", "rollout", "config",
}  # fmt: skip
KUBECTL_OPTIONS = {
    "--all", "--all-namespaces", "--as", "--create-namespace", "--field-selector", "--force", "--from-literal",
    "--grace-period", "--ignore-daemonsets", "--namespace", "--output", "--prefix", "--previous", "--recursive",
    "--replicas", "--sort-by", "--tail", "--type", "--watch", "-f", "-l", "-n", "-o", "-p",
}  # fmt: skip
ALL = [(name_of(document), command) for document in DOCUMENTS for command in commands(document)]
PRESENT = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]
"""Documents that describe what is there now."""
INLINE = [(name_of(document), command) for document in PRESENT for command in inline_commands(document)]


def of(program: str, found: list[tuple[str, list[str]]]) -> Any:
    """The arguments of the commands that run this program, whatever its folder."""
    chosen = [(where, words[1:]) for where, words in found if words and words[0].rpartition("/")[2] == program]
    return pytest.mark.parametrize(
        "arguments", [it for _, it in chosen], ids=[f"{where}: {' '.join(it)}" for where, it in chosen]
    )


def test_the_documents_have_commands() -> None:
    programs = {words[0].rpartition("/")[2] for _, words in ALL}

    assert {"make", "pretrain", "kubectl", "helm", "python"} <= programs
    assert programs <= {"make", "pretrain", "kubectl", "helm", "python", "pytest", "cosign", "gh", "docker"}


def test_a_published_image_is_verified_against_the_workflow_that_publishes_it() -> None:
    verified = [words for where, words in ALL if where == "docs/how-to/verify-release.md"]
    options = [dict(pairwise(words)) for words in verified if words[:2] == ["cosign", "verify"]]
    (identity,) = [it["--certificate-identity-regexp"] for it in options]
    workflow = re.findall(r"/(\\.github/.+)@", identity)[0].replace("\\", "")

    assert (ROOT / workflow).exists()
    assert [words[:3] for words in verified if words[0] == "gh"] == [["gh", "attestation", "verify"]] * 2
    assert [words[:4] for words in verified if words[0] == "docker"] == [["docker", "buildx", "imagetools", "inspect"]]


@of("pretrain", ALL)
def test_a_command_of_pretrain_parses(arguments: list[str]) -> None:
    CLI[arguments[0]].make_context(arguments[0], arguments[1:])


@of("pretrain", INLINE)
def test_pretrain_in_text_names_a_command_and_its_options(arguments: list[str]) -> None:
    if arguments[0] != "COMMAND":
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}

        assert options <= {"--help", *known_options(CLI[arguments[0]])}


def known_options(command: TyperCommand) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def test_options_in_text_are_some_command_s() -> None:
    known = {option for command in CLI.values() for option in known_options(command)}
    ours = [*(ROOT / "docs/get-started").glob("*.md"), *(ROOT / "docs/how-to").glob("*.md")]
    found = {code.split()[0] for it in ours for code in inline_code(it) if re.match(r"--[a-z]", code)}

    assert found <= known


@of("make", [*ALL, *INLINE])
def test_a_target_of_make_exists(arguments: list[str]) -> None:
    assert {word for word in arguments if "=" not in word} <= TARGETS


@of("python", [*ALL, *INLINE])
def test_a_module_that_python_runs_exists(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif arguments[0] == "-c":
        ast.parse(arguments[1])
    else:
        assert (ROOT / arguments[0]).exists()


@of("pytest", [*ALL, *INLINE])
def test_a_folder_of_tests_exists(arguments: list[str]) -> None:
    assert all((ROOT / word).exists() for word in arguments if "/" in word)


@of("helm", [*ALL, *INLINE])
def test_values_of_helm_exist(arguments: list[str]) -> None:
    assert arguments[0] in {"install", "test", "upgrade", "uninstall", "template"}
    assert all((ROOT / word).exists() for word in arguments if word.startswith("charts/"))
    given = [word for flag, word in pairwise(arguments) if flag == "--set"]
    assert [it for it in given if not is_value(it.partition("=")[0])] == []


def is_value(path: str) -> bool:
    """Whether the chart has this value; `*` stands for any."""
    values: Any = VALUES
    for part in path.removesuffix(".*").split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def test_values_in_the_chart_s_table_exist() -> None:
    text = (ROOT / "charts/pretrain-operator/README.md").read_text()
    named = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]

    assert named
    assert [name for name in named if not is_value(name)] == []


@of("kubectl", ALL)
def test_a_command_of_kubectl_names_what_exists(arguments: list[str]) -> None:
    words = [word for word in arguments if not word.startswith("-")]
    verb = next(word for word in words if word in VERBS)
    kind = next((word for word in words[words.index(verb) + 1 :] if not word.startswith("pretrain-")), "")

    assert unknown_options(arguments) == set()
    if verb in {"get", "describe", "delete", "scale", "patch", "create", "top"} and "-f" not in arguments:
        assert kind in KINDS
    if verb == "apply":
        assert (ROOT / arguments[arguments.index("-f") + 1]).exists()
    if verb == "explain":
        assert schema_at(kind.partition(".")[2]) is not None


def unknown_options(arguments: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in arguments if word.startswith("-")} - KUBECTL_OPTIONS


@of("kubectl", INLINE)
def test_kubectl_in_text_has_known_verbs_and_options(arguments: list[str]) -> None:
    assert any(word in VERBS for word in arguments)
    assert unknown_options(arguments) == set()


@of("kubectl", [*ALL, *INLINE])
def test_fields_in_a_command_of_kubectl_exist(arguments: list[str]) -> None:
    line = " ".join(arguments)
    inside = re.search(r"\{range (\.[^}]*)\}(.*)\{end\}", line)
    relative = re.findall(r"\{(\.[^}]+)\}", inside[2]) if inside else []
    paths = [*re.findall(r"\{(?:range )?(\.(?:spec|status|metadata)[^}]*)\}", line)]
    paths += [f"{inside[1]}{path}" for path in relative] if inside else []

    assert [path for path in paths if schema_at(path) is None] == []
    for patch in re.findall(r"\{\"spec\".*\}", line):
        assert list(problems(json.loads(patch), JOB, "")) == []
    for labels in re.findall(r"-l (\S+)", line):
        assert {label.partition("=")[0] for label in labels.split(",")} <= LABELS


@of("kubectl", ALL)
def test_no_command_asks_for_logs_of_a_restarted_worker(arguments: list[str]) -> None:
    assert "--previous" not in arguments, "pods of workers never restart"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_fields_in_text_exist(document: Path) -> None:
    paths = [code for code in inline_code(document) if re.fullmatch(r"\.?[a-z]\w*(\.\w+)+", code)]

    assert [path for path in paths if not names_a_field(path.lstrip("."))] == []


def names_a_field(path: str) -> bool:
    """Whether a path that begins as one of the resource does is one of it, or a value of the chart."""
    first = path.partition(".")[0]
    full = {"spec": path, "status": path, "elastic": f"spec.workers.{path}"}.get(first, f"spec.{path}")
    training = {"optimizer", "schedule", "model", "batch", "loss", "data", "evaluation", "sampling", "from"}
    if first in training:
        full = f"spec.training.{path}"
    elif first not in {"spec", "status", "elastic", *SPEC["properties"]}:
        return True
    return schema_at(full) is not None or is_value(path) or path.endswith((".yaml", ".json", ".jsonl", ".png"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_examples_of_job_files_have_known_fields_and_values(document: Path) -> None:
    found = [YAML(typ="safe", pure=True).load(it.text) for it in blocks(document) if it.language == "yaml"]
    jobs = [it for it in found if "kind" in it]
    fragments = [it for it in found if "kind" not in it]

    for job in jobs:
        PretrainJob.model_validate(job)
    assert [problem for fragment in fragments for problem in problems(fragment, SPEC, "spec")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_examples_of_python_import_what_exists(document: Path) -> None:
    for block in blocks(document):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    module = importlib.import_module(node.module)
                    assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=name_of)
def test_example_files_are_jobs(file: Path) -> None:
    PretrainJob.model_validate(YAML(typ="safe", pure=True).load(file.read_text()))
