"""Job files: what is wrong is said all at once, with its path, its line and what is allowed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pretrain_api.problems import InvalidJob, Problem
from pretrain_api.spec.job import PretrainJob
from pretrain_cli.inputs.job_file import load_job, parse_job
from pretrain_cli.inputs.overrides import apply_overrides, parse_override
from support.worlds.bad_jobs import BAD_JOBS, GOOD, BadJob

BAD_TEXT = """\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJb
metadata:
  name: Bad_
spec:
  workers: {replica: 3, elastic: {min: 0}}
  training:
    model: {preset: gpt2-tiny}
    data:
      sources:
        - {name: web, uri: web, weight: -1}
        - {name: books, uri: books, weight: .inf}
    steps: 1e3
    optimizer: {betas: [0.9, 2], micro_batch: 1, learningRate: 6e-4, kind: null}
    precision: bf17
    seed: true
  checkpoint:
    storage: {s3: {bucket: runs, prefix: /x}}
    interval: {duration: 5}
  recovery: []
"""


def as_yaml(document: object) -> str:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(document, text)
    return text.getvalue()


def problems_of(text: str, *sets: str) -> dict[str, Problem]:
    with pytest.raises(InvalidJob) as refused:
        parse_job(text, "job.yaml", sets)
    return {problem.path: problem for problem in refused.value.problems}


def test_a_good_file_is_a_job_with_defaults() -> None:
    job = parse_job(as_yaml(GOOD), "job.yaml")

    assert job.spec.training.steps == 100
    assert job.spec.workers.replicas == 1


def test_numbers_and_words_are_those_of_yaml_1_2() -> None:
    sets = ["training.optimizer.learningRate=6e-4", "workers.image=no"]

    spec = parse_job(as_yaml(GOOD), "job.yaml", sets).spec

    assert spec.training.optimizer.learning_rate == 0.0006
    assert spec.workers.image == "no"


def test_all_mistakes_are_said_at_once_with_their_lines() -> None:
    found = problems_of(BAD_TEXT)

    assert {path: problem.line for path, problem in found.items()} == {
        "kind": 2,
        "metadata.name": 4,
        "spec.workers.replica": 6,
        "spec.workers.elastic.min": 6,
        "spec.training.data.tokenizer": 9,
        "spec.training.data.sources[0].weight": 11,
        "spec.training.data.sources[1].weight": 12,
        "spec.training.steps": 13,
        "spec.training.optimizer.betas[1]": 14,
        "spec.training.optimizer.micro_batch": 14,
        "spec.training.optimizer.kind": 14,
        "spec.training.precision": 15,
        "spec.training.seed": 16,
        "spec.checkpoint.storage.s3.prefix": 18,
        "spec.checkpoint.interval.duration": 19,
        "spec.recovery": 20,
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("kind", "must be PretrainJob, not 'PretrainJb': did you mean PretrainJob?"),
        (
            "spec.workers.replica",
            "unknown field: did you mean replicas? (allowed: elastic, image, processesPerWorker, ",
        ),
        ("spec.workers.elastic.min", "must be at least 1, not 0"),
        ("spec.training.data.tokenizer", "is required (URI of tokenizer.json"),
        ("spec.training.data.sources[0].weight", "must be greater than 0, not -1"),
        ("spec.training.data.sources[1].weight", "expected a finite number, not inf"),
        ("spec.training.steps", "expected a whole number, not 1000.0"),
        ("spec.training.optimizer.betas[1]", "must be less than 1, not 2"),
        ("spec.training.optimizer.kind", "is empty: give it a value, or leave the field out"),
        ("spec.training.precision", "must be one of bf16, fp32, fp8, not 'bf17': did you mean bf16?"),
        ("spec.training.seed", "expected a whole number, not true"),
        ("spec.checkpoint.storage.s3.prefix", "must have no slash at either end"),
        ("spec.checkpoint.interval.duration", "expected a duration such as 90s, 10m or 1h30m"),
        ("spec.recovery", "expected a mapping (`key: value` lines), not a list"),
    ],
)
def test_a_mistake_is_said_in_plain_words(path: str, message: str) -> None:
    assert problems_of(BAD_TEXT)[path].message.startswith(message)


@pytest.mark.parametrize("bad", BAD_JOBS, ids=lambda bad: bad.name)
def test_what_the_api_server_refuses_the_parser_refuses(bad: BadJob) -> None:
    found = problems_of(as_yaml(bad.document()))

    assert len(found) == 1
    assert (bad.parser_says or bad.says) in next(iter(found.values())).message


def test_names_of_python_are_no_names_of_fields() -> None:
    text = as_yaml(GOOD).replace("apiVersion", "api_version")

    assert set(problems_of(text)) == {"apiVersion", "api_version"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- 1", "expected a PretrainJob"),
        ("a: [", "invalid YAML"),
        ("a: 1\na: 2", 'invalid YAML: found duplicate key "a"'),
        ("a: 1\n---\nb: 1", "invalid YAML: but found another document"),
        ("a: 2026-02-30", "invalid YAML: day is out of range"),
        ("a: 2026-01-01", "a date is not allowed here: put quotes around a string"),
        ("a: {1: 2}", "the key 1 is not a string: put quotes around it"),
        ("a: &a [*a]", "is an alias of its own ancestor: write the value out"),
        ("a: !!set {x}", "a set is not allowed here"),
        ("a: !!python/object:os.system x", "invalid YAML"),
        ("a: " + "[" * 600, "invalid YAML"),
    ],
)
def test_what_is_no_job_at_all_is_refused_in_a_sentence(text: str, message: str) -> None:
    assert message in next(iter(problems_of(text).values())).message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"nothing\.yaml: the file cannot be read \(No such file"):
        load_job(tmp_path / "nothing.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe")

    with pytest.raises(InvalidJob, match="not UTF-8"):
        load_job(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("sets", "field", "value"),
    [
        (["training.steps=7"], "steps", 7),
        (["spec.training.steps=7"], "steps", 7),
        (["training.steps=7", "training.steps=8"], "steps", 8),
        (["training.steps=null", "training.tokens=2K"], "tokens", 2000),
        (["training.precision=fp32"], "precision", "fp32"),
        (["training.exact=true"], "exact", True),
    ],
)
def test_set_replaces_a_field(sets: list[str], field: str, value: object) -> None:
    assert getattr(parse_job(as_yaml(GOOD), "job.yaml", sets).spec.training, field) == value


@pytest.mark.parametrize("entry", ["0", "web"])
def test_set_reaches_list_entries_by_index_and_by_name(entry: str) -> None:
    job = parse_job(as_yaml(GOOD), "job.yaml", [f"training.data.sources[{entry}].weight=2.5"])

    assert job.spec.training.data.sources[0].weight == 2.5


def test_set_makes_the_mappings_on_its_way() -> None:
    job = parse_job(as_yaml(GOOD), "job.yaml", ["checkpoint.interval.steps=20", "workers.elastic.shrinkAfter=5s"])

    assert job.spec.checkpoint.interval is not None
    assert job.spec.checkpoint.interval.steps == 20
    assert job.spec.workers.elastic.shrink_after.total_seconds() == 5


def test_the_data_that_is_overridden_stays_as_it_was() -> None:
    data = {"spec": {"workers": {"replicas": 1}}}

    changed, _ = apply_overrides(data, [parse_override("workers.replicas=2")])

    assert (changed["spec"]["workers"]["replicas"], data["spec"]["workers"]["replicas"]) == (2, 1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("training.steps", "expected PATH=VALUE"),
        ("training..steps=1", "'' is not a field"),
        ("training.steps=[", "is not valid YAML"),
        ("training.seed.x=1", "expected a whole number, not a mapping"),
        ("training.steps.x=1", "spec.training.steps has no fields: it is 100"),
        ("training.data.sources[1].weight=1", "use 0 to 0, or a name of web"),
        ("training.data.sources[books].weight=1", "spec.training.data.sources has no such entry"),
        ("training.model[0]=1", "spec.training.model is not a list: it is a mapping"),
        ("training.data.sources.weight=1", "spec.training.data.sources has no fields: it is a list"),
        ("recovery.rules[0].action=Fail", "none, the list is empty"),
        ("training.steps=0", "must be at least 1, not 0"),
        ("training.step=1", "unknown field: did you mean steps?"),
        ("training.tokens=1M", "give exactly one of steps and tokens"),
        ("workers.replicas=2", "greater than elastic.max"),
    ],
)
def test_a_bad_set_is_named_with_what_is_wrong(option: str, message: str) -> None:
    document = {**GOOD, "spec": {**GOOD["spec"], "workers": {"elastic": {"max": 1}}}}

    with pytest.raises(InvalidJob) as refused:
        parse_job(as_yaml(document), "job.yaml", [option])

    assert "--set" in str(refused.value)
    assert option in str(refused.value)
    assert message in str(refused.value)


def test_a_mistake_of_the_file_is_not_blamed_on_a_set() -> None:
    found = problems_of(BAD_TEXT, "training.precision=fp32")

    assert "spec.training.precision" not in found
    assert not any(problem.origin for problem in found.values())


def test_the_job_of_a_file_is_frozen() -> None:
    job = parse_job(as_yaml(GOOD), "job.yaml")

    with pytest.raises(ValueError, match="frozen"):
        job.spec.training.steps = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(job, PretrainJob)
