"""A run's checkpoint in Hugging Face format gives the run's validation loss, and is what was saved or is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages.export import (
    PROVENANCE_FILE,
    Advanced,
    CheckpointSkipped,
    ExportEvent,
    ExportRequest,
    Provenance,
)
from pretrain_api.messages.reports import Evaluated
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.job import Checkpoint
from pretrain_api.spec.model import resolve
from pretrain_cli.app import main
from pretrain_cli.commands.export import ExportOptions, prepare
from pretrain_trainer.core.errors import CheckpointRejectedError, InvalidInput, NoUsableCheckpointError
from pretrain_trainer.hf.export import export
from pretrain_trainer.hf.folder import ModelFolder, digests
from pretrain_trainer.hf.mapping import import_state
from support.store.moto import Bucket, moto
from support.trainer.export import FAMILIES, a_job_file, held_out_loss, trained
from support.trainer.world import VOCABULARY, a_config, a_corpus, a_tokenizer

SEQUENCES, CONTEXT = 10, 16


@dataclass(frozen=True)
class TrainedRun:
    """A run with checkpoints of steps 4 and 6."""

    config: TrainerConfig
    corpus: Path
    validation: dict[int, float]

    def request(self, out: Path, **fields: object) -> ExportRequest:
        return ExportRequest.model_validate({"config": self.config, "out": str(out)} | fields)


def a_run(folder: Path, family: str) -> TrainedRun:
    corpus = a_corpus(folder)
    held_out = [{"name": "held-out", "uri": str(corpus / "held-out")}]
    settings = {
        "model": dict(FAMILIES[family]),
        "evaluation": {"every": 2, "sequences": SEQUENCES, "sources": held_out},
        "sampling": {"tokens": 2, "temperature": 0.7},
    }
    checkpoint = {"storage": {"path": str(folder / "checkpoints")}, "interval": {"steps": 4}}
    config = a_config(corpus, settings, checkpoint=checkpoint)
    reports = trained(config)
    found = {body.step: body.losses["held-out"] for body in reports if isinstance(body, Evaluated)}
    return TrainedRun(config, corpus, found)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return a_run(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return a_run(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copied(gpt2: TrainedRun, tmp_path: Path) -> TrainedRun:
    """The run with a storage of its own, to be damaged."""
    shutil.copytree(gpt2.corpus / "checkpoints", tmp_path / "checkpoints")
    checkpoint = Checkpoint.model_validate({"storage": {"path": str(tmp_path / "checkpoints")}})
    return TrainedRun(gpt2.config.model_copy(update={"checkpoint": checkpoint}), gpt2.corpus, gpt2.validation)


def damage(run: TrainedRun, step: int) -> None:
    folder = Path(run.config.checkpoint.storage.path or "") / manifest_key(1, step).removesuffix("/manifest.json")
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_gives_the_runs_validation_loss(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: TrainedRun = request.getfixturevalue(family)
    events: list[ExportEvent] = []

    newest = export(run.request(tmp_path / "newest"), {}, events.append)
    before = export(run.request(tmp_path / "before", step=4), {}, events.append)

    tokens = run.corpus / "held-out" / "00000.bin"
    assert (newest.step, before.step) == (6, 4)
    assert held_out_loss(tmp_path / "newest", tokens, SEQUENCES, CONTEXT) == pytest.approx(run.validation[6], rel=1e-5)
    assert held_out_loss(tmp_path / "before", tokens, SEQUENCES, CONTEXT) == pytest.approx(run.validation[4], rel=1e-5)
    assert run.validation[4] != pytest.approx(run.validation[6], rel=1e-3)
    done = [event for event in events if isinstance(event, Advanced)]
    assert done[-1].done == done[-1].total > 0


def test_the_tokeniser_and_the_generation_settings_come_along(gpt2: TrainedRun, tmp_path: Path) -> None:
    export(gpt2.request(tmp_path / "out"), {}, lambda _: None)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    settings = GenerationConfig.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer.model_max_length == CONTEXT
    assert tokenizer("w3")["input_ids"] == [3]
    assert settings.temperature == 0.7
    assert settings.suppress_tokens == list(range(VOCABULARY, 64))
    assert settings.eos_token_id is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    written = model.generate(**tokenizer("w3", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5)
    assert int(written.max()) < VOCABULARY


def test_the_folder_says_where_it_came_from(gpt2: TrainedRun, tmp_path: Path) -> None:
    export(gpt2.request(tmp_path / "out"), {}, lambda _: None)

    provenance = Provenance.from_json((tmp_path / "out" / PROVENANCE_FILE).read_bytes())
    (tmp_path / "out" / PROVENANCE_FILE).unlink()
    assert (provenance.step, provenance.checkpoint) == (6, manifest_key(1, 6))
    assert provenance.files == digests(tmp_path / "out")


def test_large_weights_are_split_and_bfloat16_halves_them(gpt2: TrainedRun, tmp_path: Path) -> None:
    export(gpt2.request(tmp_path / "whole"), {}, lambda _: None)
    export(gpt2.request(tmp_path / "half", dtype="bfloat16"), {}, lambda _: None)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", local_files_only=True)
    shape = resolve(gpt2.config.training.model)
    tokenizer = (gpt2.corpus / "tokenizer.json").read_bytes()
    split = ModelFolder(shape, import_state(whole.state_dict(), shape), tokenizer, "float32", None)
    (tmp_path / "split").mkdir()
    split.write(tmp_path / "split", file_bytes=20_000)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "split", local_files_only=True)
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 2
    assert all((loaded.state_dict()[name] == tensor).all() for name, tensor in whole.state_dict().items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_step_that_is_not_there_is_answered_with_those_that_are(gpt2: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"--step 5: there is no such checkpoint; there are 4, 6$"):
        export(gpt2.request(tmp_path / "out", step=5), {}, lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(copied: TrainedRun, tmp_path: Path) -> None:
    damage(copied, 6)
    events: list[ExportEvent] = []

    exported = export(copied.request(tmp_path / "out"), {}, events.append)

    assert exported.step == 4
    passed_over = [event.message for event in events if isinstance(event, CheckpointSkipped)]
    assert passed_over[0].startswith("the checkpoint of step 6")
    with pytest.raises(CheckpointRejectedError, match="another sha256"):
        export(copied.request(tmp_path / "six", step=6), {}, events.append)
    damage(copied, 4)
    with pytest.raises(NoUsableCheckpointError, match="all 2 checkpoints"):
        export(copied.request(tmp_path / "none"), {}, events.append)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "out"}


def test_another_model_or_tokeniser_than_the_runs_is_refused(copied: TrainedRun, tmp_path: Path) -> None:
    training = copied.config.training
    wider = training.model_copy(update={"model": training.model.model_copy(update={"layers": 3})})
    (tmp_path / "other").mkdir()
    a_tokenizer(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"seven"'))
    data = training.data.model_copy(update={"tokenizer": str(file)})

    for changed, said in (
        (wider, r"training\.model is not that of the run .* \(layers is 3 here and 2 there\)"),
        (training.model_copy(update={"data": data}), r"training\.data\.tokenizer: .* is not the tokeniser"),
    ):
        config = copied.config.model_copy(update={"training": changed})
        with pytest.raises(InvalidInput, match=said):
            export(ExportRequest(config=config, out=str(tmp_path / "out")), {}, lambda _: None)
    assert not (tmp_path / "out").exists()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(gpt2: TrainedRun) -> Iterator[dict[str, str]]:
    """The environment of a service whose bucket has the run's checkpoints."""
    with moto() as environ:
        there = Bucket(environ, "runs")
        there.create()
        there.upload(gpt2.corpus / "checkpoints")
        yield environ


def pretrain_export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_the_command_exports_a_run_from_its_folder(copied: TrainedRun, tmp_path: Path) -> None:
    elsewhere = Checkpoint.model_validate({"storage": {"path": "/was/here/checkpoints"}})
    a_job_file(copied.config.model_copy(update={"checkpoint": elsewhere}), tmp_path / "job.yaml")
    command = [Path(sys.executable).with_name("pretrain"), "export", tmp_path, "--out", tmp_path / "out"]

    ended = subprocess.run(command, capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: step 6, 1,920 tokens, ")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    again = pretrain_export(tmp_path, "--out", tmp_path / "out")
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "is not empty" in again.stderr


def test_a_job_file_names_a_run_in_s3(gpt2: TrainedRun, bucket: dict[str, str], tmp_path: Path) -> None:
    s3 = Checkpoint.model_validate({"storage": {"s3": {"bucket": "runs"}}})
    job = a_job_file(gpt2.config.model_copy(update={"checkpoint": s3}), tmp_path / "job.yaml")

    request = prepare(ExportOptions(job, tmp_path / "out", 4, "float32"))
    exported = export(request, bucket, lambda _: None)

    assert exported.step == 4
    assert Provenance.from_json((tmp_path / "out" / PROVENANCE_FILE).read_bytes()).checkpoint == manifest_key(1, 4)


def test_a_folder_that_is_no_runs_is_named(tmp_path: Path) -> None:
    ended = pretrain_export(tmp_path, "--out", tmp_path / "out")

    assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
    assert "is not the folder of a run, since it has no job.yaml" in ended.stderr
