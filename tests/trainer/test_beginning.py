"""`training.from`: weights are loaded once, verified and recorded; a mismatch is reported."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.checkpoint.lineage import IDENTITY_KEY, ORIGIN_KEY, JobIdentity, Origin, manifest_key
from pretrain_api.messages.export import ExportRequest
from pretrain_api.messages.reports import Evaluated, ReportBody, Restored, StepDone
from pretrain_api.messages.trainer_config import ExitCode, TrainerConfig
from pretrain_api.spec.training import From
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import InvalidOrigin
from pretrain_store.open import S3Service
from pretrain_store.origin import choose_checkpoint, weight_files
from pretrain_trainer.hf.export import export
from support.store.moto import Bucket, moto
from support.trainer.export import FAMILIES, refused, trained
from support.trainer.world import a_config, a_corpus


@dataclass(frozen=True)
class Earlier:
    """A run with checkpoints of steps 4 and 6, and its newest one in the format of Hugging Face."""

    corpus: Path
    store: Path
    exported: Path
    validation: dict[int, float]
    identity: JobIdentity


def settings(corpus: Path, **training: Any) -> dict[str, Any]:
    held_out = [{"name": "held-out", "uri": str(corpus / "held-out")}]
    return {"evaluation": {"every": 100, "sequences": 10, "sources": held_out}} | training


def validation(reports: list[ReportBody]) -> dict[int, float]:
    return {body.step: body.losses["held-out"] for body in reports if isinstance(body, Evaluated)}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    folder = tmp_path_factory.mktemp("earlier")
    corpus, store = a_corpus(folder), folder / "checkpoints"
    checkpoint = {"storage": {"path": str(store)}, "interval": {"steps": 4}}
    model = dict(FAMILIES["llama"])
    training = settings(corpus, model=model, evaluation=settings(corpus)["evaluation"] | {"every": 2})
    config = a_config(corpus, training, checkpoint=checkpoint)
    reports = trained(config)
    export(ExportRequest(config=config, out=str(folder / "exported")), {}, lambda _: None)
    identity = JobIdentity.from_json((store / IDENTITY_KEY).read_bytes())
    return Earlier(corpus, store, folder / "exported", validation(reports), identity)


def continued(earlier: Earlier, folder: Path, start: dict[str, Any], **training: Any) -> TrainerConfig:
    """Another run of the same model, with hyperparameters of its own and a learning rate that changes nothing."""
    fields: dict[str, Any] = {
        "model": dict(FAMILIES["llama"]), "seed": 7, "steps": 1, "from": start,
        "batch": {"sequences": 8, "microBatch": 2}, "optimizer": {"learningRate": 1e-12},
        "schedule": {"kind": "constant"},
    }  # fmt: skip
    checkpoint = {"storage": {"path": str(folder / "own")}, "interval": {"steps": 1}}
    return a_config(earlier.corpus, settings(earlier.corpus, **(fields | training)), checkpoint=checkpoint)


def test_it_starts_from_the_requested_step_and_resumes_from_its_own_checkpoints(
    earlier: Earlier, tmp_path: Path
) -> None:
    shutil.copytree(earlier.store, tmp_path / "other")
    config = continued(earlier, tmp_path, {"run": str(tmp_path / "other"), "step": 4})

    first = trained(config)
    shutil.rmtree(tmp_path / "other")
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 2})})
    second = trained(longer, number=2)

    assert validation(first)[1] == pytest.approx(earlier.validation[4], rel=1e-5)
    assert [body.step for body in first if isinstance(body, StepDone)] == [1]
    assert next(body for body in first if isinstance(body, Restored)).origin == f"step 4 of {tmp_path / 'other'}"
    assert [body.step for body in second if isinstance(body, StepDone)] == [2]
    restored = next(body for body in second if isinstance(body, Restored))
    assert (restored.origin, restored.checkpoint) == (None, manifest_key(1, 1))
    record = Origin.from_json((tmp_path / "own" / ORIGIN_KEY).read_bytes())
    assert (record.checkpoint, record.step, record.optimizer) == (manifest_key(1, 4), 4, False)


def test_sharded_ranks_begin_from_the_newest_with_what_its_optimizer_keeps(earlier: Earlier, tmp_path: Path) -> None:
    start = {"run": str(earlier.store), "optimizer": True}
    config = continued(earlier, tmp_path, start, parallelism={"shard": "full"})

    reports = trained(config, world_size=2)

    assert validation(reports)[1] == pytest.approx(earlier.validation[6], rel=1e-5)
    assert Origin.from_json((tmp_path / "own" / ORIGIN_KEY).read_bytes()).optimizer


@pytest.mark.parametrize(
    ("parallelism", "world_size"),
    [({"shard": "none"}, 2), ({"shard": "full"}, 2), ({"shard": "full", "tensor": 2}, 4), ({"pipeline": 2}, 2)],
    ids=["plain", "sharded", "sharded and tensor", "pipeline"],
)
def test_a_folder_of_hugging_face_begins_it_too(
    earlier: Earlier, tmp_path: Path, parallelism: dict[str, Any], world_size: int
) -> None:
    config = continued(earlier, tmp_path, {"huggingFace": str(earlier.exported)}, parallelism=parallelism)

    reports = trained(config, world_size)

    assert validation(reports)[1] == pytest.approx(earlier.validation[6], rel=1e-5)
    assert Origin.from_json((tmp_path / "own" / ORIGIN_KEY).read_bytes()).uri == str(earlier.exported)


def test_what_is_damaged_is_not_loaded(earlier: Earlier, tmp_path: Path) -> None:
    shutil.copytree(earlier.store, tmp_path / "other")
    shutil.copytree(earlier.exported, tmp_path / "folder")
    for file in (tmp_path / "other" / "checkpoints/g000001/step-000000006/__0_0.distcp",
                 tmp_path / "folder" / "model.safetensors"):  # fmt: skip
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    run = refused(continued(earlier, tmp_path / "a", {"run": str(tmp_path / "other")}))
    folder = refused(continued(earlier, tmp_path / "b", {"huggingFace": str(tmp_path / "folder")}))

    assert (run.exit_code, folder.exit_code) == (ExitCode.INVALID, ExitCode.INVALID)
    assert "another sha256 than was saved" in run.message
    assert "model.safetensors has another sha256 than was exported" in folder.message
    assert not (tmp_path / "b" / "own" / ORIGIN_KEY).exists()


def test_a_mismatch_is_reported_before_anything_is_written(earlier: Earlier, tmp_path: Path) -> None:
    wider = continued(earlier, tmp_path, {"run": str(earlier.store)}, model=FAMILIES["llama"] | {"layers": 3})

    end = refused(wider)

    assert end.exit_code == ExitCode.INVALID
    assert end.message.startswith("training.from.run: training.model.layers is 3 here and 2 there, in ")
    assert not (tmp_path / "own").exists()


def test_a_history_with_another_origin_is_refused(earlier: Earlier, tmp_path: Path) -> None:
    fresh = continued(earlier, tmp_path, {"run": str(earlier.store)})
    trained(fresh.model_copy(update={"training": fresh.training.model_copy(update={"origin": None})}))

    end = refused(fresh, number=1)

    assert end.exit_code == ExitCode.INVALID
    assert "holds checkpoints that did not begin from" in end.message


# --- what fits --------------------------------------------------------------------------------------------------------


def wanted(earlier: Earlier, **model: Any) -> JobIdentity:
    """The identity of a job whose model has these fields changed."""
    return earlier.identity.model_copy(
        update={"model": earlier.identity.model | model, "model_digest": "another" if model else "m"}
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"family": "gpt2"}, "training.model.family is gpt2 here and llama there"),
        ({"layers": 3}, "training.model.layers is 3 here and 2 there"),
        ({"heads": 8}, "training.model.heads is 8 here and 4 there"),
        ({"kvHeads": 4}, "training.model.kvHeads is 4 here and 2 there"),
        ({"width": 64}, "training.model.width is 64 here and 32 there"),
        ({"hidden": 512}, "training.model.hidden is 512 here and 256 there"),
        ({"tiedHead": True}, "training.model.tiedHead is true here and false there"),
        ({"vocabulary": 128}, "training.model.vocabulary is 128 here and 64 there"),
        ({"ropeTheta": 500.0}, "training.model.ropeTheta is 500 here and 10000 there"),
    ],
)
def test_another_architecture_is_named_by_the_field_that_differs(
    earlier: Earlier, model: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidOrigin, match=f"training.from.run: {said}, in "):
        choose_checkpoint(DirectoryStore(earlier.store), From(run="there"), wanted(earlier, **model))
    with pytest.raises(InvalidOrigin, match=f"training.from.huggingFace: {said}, in "):
        weight_files(DirectoryStore(earlier.exported), From(hugging_face="there"), wanted(earlier, **model), b"")


def test_weights_that_are_laid_out_otherwise_are_refused(earlier: Earlier) -> None:
    newer = wanted(earlier).model_copy(update={"version": earlier.identity.version + 1})

    with pytest.raises(InvalidOrigin, match="another layout of weights"):
        choose_checkpoint(DirectoryStore(earlier.store), From(run="there"), newer)


def test_a_longer_context_with_a_higher_base_or_new_scaling_is_the_same_architecture(earlier: Earlier) -> None:
    scaling = {"factor": 8.0, "lowFrequencyFactor": 1.0, "highFrequencyFactor": 4.0, "originalContext": 16}
    longer = wanted(earlier, context=128, ropeTheta=5e5, ropeScaling=scaling, dropout=0.1)

    manifest, origin = choose_checkpoint(DirectoryStore(earlier.store), From(run="there"), longer)

    assert manifest.step == origin.step == 6


def test_another_tokeniser_is_refused(earlier: Earlier) -> None:
    with pytest.raises(InvalidOrigin, match=r"another tokeniser than training\.data\.tokenizer"):
        choose_checkpoint(
            DirectoryStore(earlier.store),
            From(run="there"),
            earlier.identity.model_copy(update={"tokenizer_digest": "x"}),
        )
    own = json.loads((earlier.corpus / "tokenizer.json").read_text())
    same = json.dumps(own).encode()
    own["model"]["vocab"]["w1"], own["model"]["vocab"]["w2"] = 2, 1
    files = DirectoryStore(earlier.exported), From(hugging_face="there"), earlier.identity
    assert weight_files(*files, same) == ("model.safetensors",)
    with pytest.raises(InvalidOrigin, match=r"another tokeniser than training\.data\.tokenizer"):
        weight_files(*files, json.dumps(own).encode())


def test_a_step_that_is_not_there_is_answered_with_those_that_are(earlier: Earlier) -> None:
    with pytest.raises(InvalidOrigin, match=r"training\.from\.step: there has no checkpoint of step 5; it has 4, 6$"):
        choose_checkpoint(DirectoryStore(earlier.store), From(run="there", step=5), earlier.identity)


def test_a_start_that_came_to_nothing_is_repeated_with_the_checkpoint_it_had_chosen(earlier: Earlier) -> None:
    there = DirectoryStore(earlier.store)
    _, before = choose_checkpoint(there, From(run="there", step=4), earlier.identity)

    _, again = choose_checkpoint(there, From(run="there"), earlier.identity, pinned=before)

    assert again.step == 4


def test_pickled_weights_are_not_loaded(earlier: Earlier, tmp_path: Path) -> None:
    shutil.copy(earlier.exported / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"evil")

    with pytest.raises(InvalidOrigin, match="pickles are not loaded"):
        weight_files(DirectoryStore(tmp_path), From(hugging_face="there"), earlier.identity, b"")


def test_it_is_found_in_s3_too(earlier: Earlier, tmp_path: Path) -> None:
    config = continued(earlier, tmp_path, {"run": "s3://runs/earlier"})
    with moto() as environ:
        bucket = Bucket(environ, "runs")
        bucket.create()
        for path in earlier.store.rglob("*"):
            if path.is_file():
                bucket.put(f"earlier/{path.relative_to(earlier.store)}", path.read_bytes())
        there = S3Service(config.checkpoint.storage, environ).folder("s3://runs/earlier")

        manifest, _ = choose_checkpoint(there, config.training.origin or From(run="s3://x"), earlier.identity)

    assert manifest.step == 6
