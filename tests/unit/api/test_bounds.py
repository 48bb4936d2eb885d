"""Bounds of messages: every field of every message has one, and a value outside it is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
from pydantic import ValidationError

from pretrain_api.bounds import MAX_TEXT
from pretrain_api.messages.protocol import AGENT_MESSAGE, COORDINATOR_MESSAGE, Hello, Report
from pretrain_api.messages.reports import Diverged, Evaluated, Failed, StepDone

STEP = StepDone(
    step=1, loss=1.0, grad_norm=1.0, learning_rate=1.0, tokens=1, tokens_per_second=1.0, seconds=1.0
)  # fmt: skip
HELLO = Hello(job_uid="uid", slot=0, attempt=0, agent_id="a", host="h")


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema within a core schema."""
    if isinstance(schema, dict):
        node = cast(dict[str, Any], schema)
        if isinstance(node.get("type"), str):
            yield node
        for name, inside in node.items():
            if name != "metadata":
                yield from schemas(inside)
    elif isinstance(schema, list | tuple):
        for item in cast(list[Any], schema):
            yield from schemas(item)


def is_bounded(schema: dict[str, Any]) -> bool:
    match schema["type"]:
        case "int":
            return ("ge" in schema or "gt" in schema) and ("le" in schema or "lt" in schema)
        case "float":
            between = ("ge" in schema or "gt" in schema) and ("le" in schema or "lt" in schema)
            return between or "allow_inf_nan" in schema  # NaN is within no limits
        case "str" | "tuple" | "list" | "dict" | "set":
            return "max_length" in schema
        case _:
            return True


@pytest.mark.parametrize("messages", [AGENT_MESSAGE, COORDINATOR_MESSAGE], ids=["agent", "coordinator"])
def test_every_number_text_and_collection_of_a_message_is_bounded(messages: Any) -> None:
    found = list(schemas(messages.core_schema))

    assert {it["type"] for it in found} >= {"int", "float", "str", "tuple"}
    assert [it for it in found if not is_bounded(it)] == []


BAD_HELLOS: dict[str, Any] = {
    "processes": 10**12, "slot": -1, "attempt": 10**30, "pid": 2**40, "highestNumber": 2**62, "highestEpoch": 2**63,
    "step": 10**400, "steppedSeconds": "NaN", "stepSeconds": 1e300, "agentId": "a" * 300, "host": "h" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("field", BAD_HELLOS)
def test_a_hello_out_of_bounds_is_refused_by_the_field_s_name(field: str) -> None:
    message = {**json.loads(HELLO.to_json()), field: BAD_HELLOS[field]}

    with pytest.raises(ValidationError, match=field):
        AGENT_MESSAGE.validate_json(json.dumps(message))


BAD_STEPS: dict[str, Any] = {
    "tokens": 10**400, "step": -1, "seconds": "Infinity", "tokensPerSecond": "NaN", "stallSeconds": 1e12,
}  # fmt: skip


@pytest.mark.parametrize("field", BAD_STEPS)
def test_a_report_out_of_bounds_is_refused_by_the_field_s_name(field: str) -> None:
    message = json.loads(Report(seq=1, generation=1, time=1.0, body=STEP).to_json())
    message["body"][field] = BAD_STEPS[field]

    with pytest.raises(ValidationError, match=field):
        AGENT_MESSAGE.validate_json(json.dumps(message))


@pytest.mark.parametrize("time", ["NaN", "Infinity", -1, 1e18])
def test_an_implausible_time_is_refused(time: Any) -> None:
    message = {**json.loads(Report(seq=1, generation=1, time=1.0, body=STEP).to_json()), "time": time}

    with pytest.raises(ValidationError, match="time"):
        AGENT_MESSAGE.validate_json(json.dumps(message))


def test_an_evaluation_of_very_many_sources_is_refused() -> None:
    evaluated = Evaluated(step=1, losses={"a": 1.0}, seconds=1.0)
    message = json.loads(Report(seq=1, generation=1, time=1.0, body=evaluated).to_json())
    message["body"]["losses"] = {f"source-{number}": 1.0 for number in range(100_000)}

    with pytest.raises(ValidationError, match="losses"):
        AGENT_MESSAGE.validate_json(json.dumps(message))


def test_a_range_of_steps_within_a_report_is_bounded_too() -> None:
    message = json.loads(Report(seq=1, generation=1, time=1.0, body=STEP).to_json())
    message["body"] = {"kind": "restored", "step": 1, "skipped": [{"first": 1, "last": 10**15}]}

    with pytest.raises(ValidationError, match="skipped"):
        AGENT_MESSAGE.validate_json(json.dumps(message))


def test_a_loss_that_is_no_number_is_legitimate() -> None:
    body = STEP.model_copy(update={"loss": float("nan"), "grad_norm": float("inf")})
    report = Report(seq=1, generation=1, time=1.0, body=body)

    read = AGENT_MESSAGE.validate_json(report.to_json())

    assert read.to_json() == report.to_json()


def test_a_long_text_is_cut_not_refused() -> None:
    failed = Failed(rank=0, reason="Error", message="x" * 10**6)
    diverged = Diverged(step=1, since=1, cause="LossSpike", action="Warn", message="short")

    assert len(failed.message) == MAX_TEXT
    assert failed.message.endswith("…")
    assert diverged.message == "short"


def test_a_duration_slightly_below_zero_is_zero() -> None:
    assert StepDone(**{**dict(STEP), "data_seconds": -1e-6}).data_seconds == 0


def test_a_message_leaves_the_schemas_of_the_values_inside_alone() -> None:
    script = (
        "import json\n"
        "from pretrain_api.spec.job import PretrainJob\n"
        "before = json.dumps(PretrainJob.model_json_schema())\n"
        "import pretrain_operator.local.control_channel as channel\n"
        "channel.SUPERVISOR_MESSAGE.rebuild(force=True)\n"
        "PretrainJob.model_rebuild(force=True)\n"
        "assert json.dumps(PretrainJob.model_json_schema()) == before\n"
    )

    subprocess.run([sys.executable, "-c", script], check=True)
