"""Whatever is written in a job file, it is a job or there are problems; a job that is written reads back."""

from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import PretrainJob
from pretrain_cli.inputs.job_file import parse_job
from support.worlds.bad_jobs import with_changes

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1h", "10B", "0s", "gpt2-tiny", "gpt2", "llama", "adamw", "cosine", "fp32", "full", "a"])
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
JSON = st.recursive(  # what an API server can hold: no infinity, no NaN
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SMALL = st.integers(1, 12)
FIELDS = {
    "workers.replicas": SMALL,
    "workers.elastic": st.fixed_dictionaries({}, optional={"min": SMALL, "max": SMALL, "growCooldown": st.just("90s")}),
    "workers.template": st.dictionaries(st.text(max_size=5), JSON, max_size=2),
    "training.steps": SMALL | st.none(),
    "training.tokens": SMALL | st.sampled_from(["10B", "1.5K"]) | st.none(),
    "training.batch": st.fixed_dictionaries({"sequences": SMALL, "microBatch": SMALL}),
    "training.model": st.fixed_dictionaries(
        {}, optional={"preset": st.just("gpt2-tiny"), "heads": SMALL, "width": SMALL, "layers": SMALL, "context": SMALL}
    ),
    "training.schedule": st.fixed_dictionaries(
        {"kind": st.sampled_from(["cosine", "linear", "wsd", "constant"])},
        optional={"warmupSteps": SMALL, "decaySteps": SMALL},
    ),
    "training.optimizer": st.fixed_dictionaries(
        {}, optional={"clip": st.none() | st.floats(), "learningRate": st.floats(), "betas": st.lists(st.floats(0, 1))}
    ),
    "training.parallelism": st.fixed_dictionaries({"tensor": SMALL, "pipeline": SMALL}),
    "checkpoint.interval": st.fixed_dictionaries({}, optional={"steps": SMALL, "duration": st.just("1.5s")}),
    "recovery.rules": st.lists(
        st.fixed_dictionaries(
            {"action": st.just("Fail")},
            optional={"onLog": st.text(max_size=4), "onExitCodes": st.lists(st.integers(-70, 260), max_size=2)},
        ),
        max_size=2,
    ),
}
NEARLY_VALID = st.fixed_dictionaries({}, optional=FIELDS)
SPOILT = st.dictionaries(
    st.sampled_from([*FIELDS, "training", "checkpoint", "training.data", "foo"]), ANYTHING, max_size=2
)


def document(changes: dict[str, Any]) -> dict[str, Any]:
    """Shorter paths first, so that what is spoilt stays so."""
    made = with_changes({})
    for path, value in sorted(changes.items()):
        *parents, last = f"spec.{path}".split(".")
        place: Any = made
        for key in parents:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = value
    return made


def as_yaml(value: object) -> str:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, text)
    return text.getvalue()


def job_or_none(text: str, *sets: str) -> PretrainJob | None:
    """The job, or None when there are problems; any other exception is a failure."""
    problems = ()
    try:
        return parse_job(text, "job.yaml", sets)
    except InvalidJob as invalid:
        problems = invalid.problems
    assert problems
    assert all(problem.message for problem in problems)
    return None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(NEARLY_VALID, SPOILT)
def test_a_document_is_a_job_or_has_problems(valid: dict[str, Any], spoilt: dict[str, Any]) -> None:
    job = job_or_none(as_yaml(document(valid | spoilt)))

    assert job is None or PretrainJob.from_json(job.to_json()) == job


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(NEARLY_VALID)
def test_a_job_reads_back_from_yaml_as_it_was_written(valid: dict[str, Any]) -> None:
    job = job_or_none(as_yaml(document(valid)))
    assume(job is not None)
    assert job is not None

    assert parse_job(as_yaml(json.loads(job.to_json())), "job.yaml") == job


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="abcs:{}[]&*!-?|>%@`\"'# \n01.", max_size=60))
def test_any_text_is_a_job_or_has_problems(text: str) -> None:
    assert job_or_none(text) is None


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet="trainingsteps.[]0=1{}: ", max_size=40))
def test_any_set_is_applied_or_has_problems(option: str) -> None:
    job_or_none(as_yaml(with_changes({})), option)
