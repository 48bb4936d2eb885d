"""A rank that exhausts its memory writes a snapshot and reports its location."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain_api.spec.job import Storage
from pretrain_sdk.rank_logs import LOGS_VARIABLE
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.observability.failures import process_exit
from pretrain_trainer.observability.oom_snapshot import describe, write_snapshot
from support.trainer.world import a_config, a_corpus, run_program

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def test_the_text_names_the_largest_tensors_each_storage_once() -> None:
    large = torch.nn.Parameter(torch.zeros(3, 2**20))
    views = [large.detach()[:, :5], large.detach().view(-1)]

    lines = describe().splitlines()

    assert lines[0].startswith("process: ")
    assert (
        len([line for line in lines if "12.0 MiB" in line and "resident" not in line and "storages" not in line]) == 1
    )
    assert len(views) == 2


def test_it_is_written_next_to_the_logs_or_else_to_the_store(tmp_path: Path) -> None:
    storage = Storage(path=str(tmp_path / "store"))
    logs = tmp_path / "logs"
    logs.mkdir()

    beside = write_snapshot(3, 7, storage, Environment.of({LOGS_VARIABLE: str(logs)}))
    stored = write_snapshot(3, 7, storage, Environment.of({"TMPDIR": str(tmp_path)}))

    assert (beside, stored) == (str(logs / "rank3-memory.txt"), str(tmp_path / "store/memory/g000007/rank3-memory.txt"))
    assert all("largest" in Path(path).read_text() for path in (beside, stored))
    assert not (tmp_path / "rank3-memory.txt").exists()


def test_the_failure_names_the_location_if_there_is_one(tmp_path: Path) -> None:
    end = process_exit(OUT_OF_MEMORY, 0)

    assert end.with_snapshot("/logs/x").report.message.endswith("memory snapshot: /logs/x")  # type: ignore[union-attr]
    assert end.with_snapshot("/logs/x").message.endswith("memory snapshot: /logs/x")
    assert end.with_snapshot("") == end
    assert write_snapshot(0, 1, None, Environment.of({LOGS_VARIABLE: str(tmp_path / "missing")})) == ""


def test_a_program_without_memory_ends_with_the_location_in_its_last_line(tmp_path: Path) -> None:
    """A perceptron so wide that no machine holds it."""
    model = {"family": "gpt2", "layers": 1, "heads": 1, "width": 131_072, "hidden": 1_048_576, "context": 16}
    config = a_config(a_corpus(tmp_path), {"model": model | {"layers": 1000}})
    (tmp_path / "config.json").write_text(config.to_json())

    ended = run_program(tmp_path, tmp_path / "config.json")

    assert ended.exit_code == 70, ended.stderr
    place = ended.stderr.strip().splitlines()[-1].rpartition("memory snapshot: ")[2]
    assert Path(place).is_relative_to(tmp_path / "checkpoints/memory")
    assert "largest" in Path(place).read_text()
