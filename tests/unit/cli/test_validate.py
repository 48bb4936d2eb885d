"""`pretrain validate`: a verdict that can be read, and an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain_cli.commands.validate import validate
from pretrain_data.writer import train_tokenizer
from support.worlds.bad_jobs import with_changes


def written(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A job file; JSON is YAML."""
    file = folder / "job.yaml"
    file.write_text(json.dumps(with_changes(changes or {}), indent=1))
    return file


@pytest.mark.bare
def test_a_good_job_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    train_tokenizer(["a text"], 300, tmp_path / "data" / "tokenizer.json")

    assert validate(file, ["training.steps=10"]) == 0
    rows = 64 * 5  # the alphabet of 256 bytes and a few merges, rounded up
    parameters = (rows + 32) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert capsys.readouterr().out.splitlines() == [
        f"{file} is valid",
        f"model: {parameters / 1000:.4g} K parameters (gpt2, 2 layers, 2 heads, width 32, context 32)",
        "training: 10 steps of 2,048 tokens, 20.48 K tokens in all",
    ]


def test_without_its_tokeniser_the_embedding_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(written(tmp_path), []) == 0
    assert "parameters plus the embedding" in capsys.readouterr().out


def test_every_mistake_is_a_line_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, {"spec.training.precision": "fp16"})

    assert validate(file, ["workers.replicas=0"]) == 2
    line = 1 + file.read_text().splitlines().index('   "precision": "fp16"')
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"{file}: spec.workers.replicas (--set workers.replicas=0): must be at least 1, not 0",
        f"{file}:{line}: spec.training.precision: must be one of bf16, fp32, fp8, not 'fp16': did you mean bf16?",
    ]


def test_what_is_not_there_yet_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(written(tmp_path, {"spec.training.precision": "fp8"}), []) == 2
    assert "spec.training.precision: fp8 is not supported yet" in capsys.readouterr().out


def test_what_is_not_applied_yet_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(written(tmp_path, {"spec.workers.elastic": {"growCooldown": "10s"}}), []) == 0
    assert "warning: spec.workers.elastic.growCooldown: has no effect: a job does not grow" in capsys.readouterr().out
