"""Presets, quantities, identity, and what this version does not act on."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.checkpoint.identity import differences, job_identity, model_fields
from pretrain_api.dataset import Dataset, Shard
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.model import Model, parameters, resolve
from pretrain_api.spec.presets import PRESETS
from pretrain_api.spec.quantities import format_duration, parse_duration, parse_tokens
from pretrain_api.spec.replicas import nearest
from pretrain_api.spec.support import unsupported
from support.worlds.bad_jobs import GOOD, with_changes


def job(changes: dict[str, Any] | None = None) -> PretrainJob:
    return PretrainJob.model_validate(with_changes(changes or {}), by_alias=True, by_name=False)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "published"),
    [
        ("gpt2-124m", 50_257, 124_439_808),
        ("gpt2-355m", 50_257, 354_823_168),
        ("gpt2-774m", 50_257, 774_030_080),
        ("gpt2-1.5b", 50_257, 1_557_611_200),
        ("llama-1b", 128_256, 1_235_814_400),
        ("llama-3b", 128_256, 3_212_749_824),
        ("llama-8b", 128_256, 8_030_261_248),
        ("llama-70b", 128_256, 70_553_706_496),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(preset: str, vocabulary: int, published: int) -> None:
    assert parameters(resolve(Model(preset=preset)), vocabulary) == published


def test_the_number_of_parameters_is_that_of_the_model_itself() -> None:
    own = {"layers": 3, "heads": 4, "width": 32, "context": 16}
    changed = Model.model_validate(own | {"family": "llama", "kvHeads": 2, "hidden": 48})

    assert parameters(resolve(changed), 96) == 2 * 96 * 32 + 3 * (2 * 32 + 32 * 64 + 32 * 32 + 3 * 32 * 48) + 32


def test_fields_change_a_preset() -> None:
    resolved = resolve(Model(preset="gpt2-124m", layers=3, tied_head=False))

    assert (resolved.layers, resolved.heads, resolved.tied_head) == (3, 12, False)


def test_a_model_of_ones_own_has_its_familys_defaults() -> None:
    gpt2 = resolve(Model(layers=2, heads=4, width=32, context=16))
    llama = resolve(Model(family="llama", layers=2, heads=4, kv_heads=2, width=32, context=16))

    assert (gpt2.family, gpt2.kv_heads, gpt2.tied_head, gpt2.bias) == ("gpt2", 4, True, True)
    assert (llama.kv_heads, llama.tied_head, llama.bias) == (2, False, False)


def test_an_unknown_preset_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"gpt5") as refused:
        Model(preset="gpt5")
    assert all(name in str(refused.value) for name in PRESETS)


@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 64), (64, 64), (65, 128), (50_257, 50_304)])
def test_the_embedding_is_the_tokenisers_rounded_up(vocabulary: int, rows: int) -> None:
    assert resolve(Model(preset="gpt2-tiny")).embedding_rows(vocabulary) == rows


def test_a_written_vocabulary_is_taken_as_it_is() -> None:
    assert resolve(Model(preset="gpt2-tiny", vocabulary=301)).embedding_rows(300) == 301


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("250ms", 0.25), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "5", "-1s", "1 h", "1y", "9" * 33 + "s", "4000d", "١s", 5, None, True])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@settings(deadline=None)
@given(st.integers(0, 10**11))
def test_a_written_duration_reads_back(milliseconds: int) -> None:
    value = timedelta(milliseconds=milliseconds)

    assert parse_duration(format_duration(value)) == value


@pytest.mark.parametrize(
    ("text", "tokens"), [(5, 5), (1e9, 10**9), ("10B", 10**10), ("1.5M", 1_500_000), ("7", 7), ("0.1K", 100)]
)
def test_a_number_of_tokens_is_read(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "B", "1b", "1 M", "-1", 1.5, float("inf"), float("nan"), None, True, "9" * 40])
def test_what_is_no_number_of_tokens_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="number of tokens"):
        parse_tokens(text)


def test_tokens_are_rounded_up_to_steps() -> None:
    training = job({"spec.training.tokens": 2049, "spec.training.steps": None}).spec.training

    assert (training.tokens_per_step, training.total_steps) == (2048, 2)


DATASET = Dataset(
    dtype="uint16",
    vocabulary=300,
    documents=1,
    tokenizer_digest="t",
    shards=(Shard(name="00000.bin", tokens=100, sha256="a"),),
)


def identity_of(changes: dict[str, Any] | None = None, dataset: Dataset = DATASET, tokenizer: str = "t") -> Any:
    training = job(changes).spec.training
    return job_identity(training, resolve(training.model), [dataset], tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.training.data.sources": [{"name": "web", "uri": "elsewhere"}]},
        {"spec.training.data.tokenizer": "elsewhere"},
        {"spec.training.steps": 5},
        {"spec.training.optimizer": {"learningRate": 1e-3}},
        {"spec.training.batch": {"sequences": 64, "microBatch": 4}},
        {"spec.training.model": {"preset": "gpt2-tiny", "vocabulary": 320}},
        {"spec.training.model": {"layers": 2, "heads": 2, "width": 32, "context": 32}},
    ],
)
def test_the_same_run_said_otherwise_has_the_same_identity(changes: dict[str, Any]) -> None:
    assert identity_of(changes) == identity_of()


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"spec.training.data.sources": [{"name": "w", "uri": "data/web"}]}, ("training.data.sources",)),
        ({"spec.training.data.sources": [{"name": "web", "uri": "u", "weight": 2}]}, ("training.data.sources",)),
        ({"spec.training.seed": 2}, ("training.seed",)),
        ({"spec.training.batch": {"sequences": 8}}, ("training.batch.sequences",)),
        ({"spec.training.model": {"preset": "gpt2-tiny", "layers": 3}}, ("training.model",)),
        ({"spec.training.model": {"preset": "gpt2-tiny", "context": 16}}, ("training.model", "training.model.context")),
    ],
)
def test_another_run_has_another_identity(changes: dict[str, Any], differing: tuple[str, ...]) -> None:
    assert differences(identity_of(changes), identity_of()) == differing


def test_other_bytes_make_another_identity() -> None:
    other = DATASET.model_copy(update={"shards": (Shard(name="00000.bin", tokens=100, sha256="b"),)})

    assert differences(identity_of(dataset=other), identity_of()) == ("training.data.sources",)
    assert differences(identity_of(tokenizer="u"), identity_of()) == ("training.data.tokenizer",)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.precision", "fp8"),
    ],
)
def test_what_is_not_there_yet_is_refused_by_name(path: str, value: object) -> None:
    (finding,) = unsupported(job({f"spec.{path}": value}).spec)

    assert finding.severity == "error"
    assert finding.path.startswith(f"spec.{path}")
    assert re.search("not supported yet|do not support", finding.message)


def test_a_field_that_came_later_changes_no_identity_at_its_default() -> None:
    plain, post = (resolve(Model(preset="gpt2-tiny", norm=norm)) for norm in (None, "post"))

    assert "norm" not in model_fields(plain, 64)
    assert model_fields(post, 64)["norm"] == "post"


@pytest.mark.parametrize("shard", ["none", "full", "hybrid"])
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_what_replicas_of_several_processes_cannot_do_is_refused(shard: str, way: str) -> None:
    changes = {
        "spec.training.exact": True,
        "spec.training.compile": True,
        "spec.workers": {"replicas": 2, "processesPerWorker": 2},
    }
    alone = job({**changes, "spec.training.parallelism": {"shard": shard}})
    several = job({**changes, "spec.training.parallelism": {"shard": shard, way: 2}})

    assert unsupported(alone.spec) == ()
    refused = ["spec.training.exact", "spec.training.compile"] if way == "tensor" else ["spec.training.exact"]
    assert [finding.path for finding in unsupported(several.spec)] == refused


@pytest.mark.parametrize(
    ("parallelism", "processes", "fitting"),
    [
        ({}, 1, (1, 2, 3)),
        ({"tensor": 2}, 1, (2, 4, 6)),
        ({"tensor": 2}, 2, (1, 2, 3)),
        ({"tensor": 2, "pipeline": 2}, 1, (4, 8)),
        ({"tensor": 2, "pipeline": 2}, 6, (2, 4, 6)),
        ({"shard": "hybrid", "tensor": 2}, 4, (1, 2, 3)),
    ],
)
def test_workers_come_in_whole_replicas(parallelism: dict[str, Any], processes: int, fitting: tuple[int, ...]) -> None:
    for workers in range(1, max(fitting) + 1):
        changes = {
            "spec.training.parallelism": parallelism,
            "spec.workers": {"replicas": workers, "processesPerWorker": processes},
        }
        if workers in fitting:
            job(changes)
            continue
        with pytest.raises(ValueError, match=r"workers\.replicas: a replica of the model takes") as refused:
            job(changes)
        assert f"use {nearest(workers, fitting[0])}" in str(refused.value)


def test_hybrid_shards_need_whole_replicas_in_a_worker() -> None:
    with pytest.raises(ValueError, match=r"set processesPerWorker to 2 or 4"):
        job({
            "spec.training.parallelism": {"shard": "hybrid", "tensor": 2},
            "spec.workers": {"replicas": 2, "processesPerWorker": 3},
        })  # fmt: skip


def test_workers_whose_processes_a_template_decides_are_left_to_who_makes_pods() -> None:
    workers = {"replicas": 1, "template": {"spec": {"containers": [{"name": "worker"}]}}}

    assert job({"spec.training.parallelism": {"tensor": 2}, "spec.workers": workers}).spec.workers.replicas == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("workers.elastic.growCooldown", "90s"),
    ],
)
def test_what_is_not_applied_yet_is_a_warning(path: str, value: object) -> None:
    (finding,) = unsupported(job({f"spec.{path}": value}).spec)

    assert (finding.severity, finding.path) == ("warning", f"spec.{path}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.model", {"preset": "llama-1b"}),
        ("training.optimizer", {"kind": "sgd"}),
        ("training.parallelism", {"shard": "hybrid"}),
        ("training.schedule", {"kind": "wsd"}),
        ("recovery.rules", [{"onReason": "OutOfMemory", "action": "Quarantine"}]),
        ("recovery.suspects", {"failures": 3}),
    ],
)
def test_what_is_acted_on_is_no_finding(path: str, value: object) -> None:
    assert unsupported(job({f"spec.{path}": value}).spec) == ()


def test_defaults_written_out_are_no_warning() -> None:
    assert unsupported(job().spec) == unsupported(PretrainJob.from_json(job().to_json()).spec) == ()


def test_a_regular_expression_must_be_one() -> None:
    with pytest.raises(ValueError, match="is not a valid regular expression"):
        job({"spec.recovery.rules": [{"onLog": "(", "action": "Fail"}]})


def test_a_job_of_the_api_server_is_read_with_what_it_added() -> None:
    added = {"creationTimestamp": "2026-01-01T00:00:00Z", "uid": "u", "resourceVersion": "1", "managedFields": []}
    document = {**GOOD, "metadata": {**GOOD["metadata"], **added}, "status": {"phase": "Training"}}

    assert PretrainJob.model_validate(document).metadata.uid == "u"
