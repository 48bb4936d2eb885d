"""A restored state is bit-equal to the saved one, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from pretrain_agent.network.metrics_server import SAVE_STAGES
from pretrain_api.checkpoint.lineage import StepRange, checkpoint_folder, manifest_key, parse_manifest_key
from pretrain_api.messages.reports import Saved
from pretrain_store.directory import DirectoryStore
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks, process_group
from support.trainer.checkpoint import (
    Trained,
    a_job,
    arrays,
    assert_equal,
    on_rank,
    open_checkpointer,
    restored,
    saved,
)
from support.trainer.world import run_ranks


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


def test_a_fresh_start_restores_nothing_and_keeps_the_model(tmp_path: Path) -> None:
    checkpointer = open_checkpointer(a_job(tmp_path))
    trained = Trained()
    before = trained.state()

    assert checkpointer.parent is None
    assert checkpointer.restore(trained.model, trained.optimizer) == TrainingProgress(0, 0, ())
    assert_equal(trained.state(), before)


def test_model_optimizer_and_progress_come_back_bit_for_bit(tmp_path: Path) -> None:
    trained = Trained(steps=3)
    first = open_checkpointer(a_job(tmp_path))
    progress = TrainingProgress(3, 1234, (StepRange(first=7, last=9),))
    first.save(progress, trained.model, trained.optimizer)
    key = first.wait()

    second = open_checkpointer(a_job(tmp_path), 2)
    came_back, again = restored(second)

    assert key == "checkpoints/g000001/step-000000003/manifest.json"
    assert came_back == progress
    assert_equal(again.state(), trained.state())


def test_training_resumes_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    uninterrupted = Trained(steps=3)
    saved(open_checkpointer(a_job(tmp_path)), uninterrupted, 3)
    uninterrupted.train(4)

    _, again = restored(open_checkpointer(a_job(tmp_path), 2))
    again.train(4)

    assert_equal(again.state(), uninterrupted.state())


def test_each_later_save_holds_its_own_step(tmp_path: Path) -> None:
    trained = Trained(steps=1)
    first = open_checkpointer(a_job(tmp_path))
    for step in (1, 2, 3):
        saved(first, trained, step)
        at_last = trained.state()
        trained.train(1)

    progress, again = restored(open_checkpointer(a_job(tmp_path), 2))

    assert progress.step == 3
    assert_equal(again.state(), at_last)


def test_a_save_is_of_the_moment_it_was_begun(tmp_path: Path) -> None:
    trained = Trained(steps=1)
    first = open_checkpointer(a_job(tmp_path))
    for step in (1, 2):
        at_save = trained.state()
        first.save(TrainingProgress(step), trained.model, trained.optimizer)
        trained.train(5)
        first.wait()

    assert_equal(restored(open_checkpointer(a_job(tmp_path), 2))[1].state(), at_save)


def test_state_that_appears_later_is_saved_as_well(tmp_path: Path) -> None:
    first = open_checkpointer(a_job(tmp_path))
    trained = Trained(steps=0)
    saved(first, trained, 1)
    trained.train(1)
    saved(first, trained, 2)

    assert_equal(restored(open_checkpointer(a_job(tmp_path), 2))[1].state(), trained.state())


def test_the_momentum_of_sgd_comes_back(tmp_path: Path) -> None:
    trained = Trained(steps=2, kind="sgd")
    saved(open_checkpointer(a_job(tmp_path, kind="sgd")), trained, 2)

    _, again = restored(open_checkpointer(a_job(tmp_path, kind="sgd"), 2), kind="sgd")

    assert any(name.endswith("momentum_buffer") for name in again.state())
    assert_equal(again.state(), trained.state())


def test_the_state_of_another_optimizer_is_refused_with_the_field(tmp_path: Path) -> None:
    saved(open_checkpointer(a_job(tmp_path)), Trained(steps=2), 2)
    checkpointer = open_checkpointer(a_job(tmp_path, kind="sgd"), 2)

    with pytest.raises(InvalidInput, match=r"training\.optimizer\.kind.*another optimizer than sgd"):
        restored(checkpointer, kind="sgd")


def test_stock_dcp_reads_a_checkpoint(tmp_path: Path) -> None:
    trained = Trained(steps=1)
    first = open_checkpointer(a_job(tmp_path))
    for step in (1, 2):
        trained.train(1)
        key = saved(first, trained, step)
    folder = tmp_path / "checkpoints" / key.removesuffix("manifest.json")
    found = {name: torch.zeros_like(tensor) for name, tensor in trained.state().items()}

    load(found, storage_reader=FileSystemReader(folder), no_dist=True)

    assert_equal(found, trained.state())


def test_outcomes_are_reported_once_with_what_the_save_cost(tmp_path: Path) -> None:
    checkpointer = open_checkpointer(a_job(tmp_path))
    key = saved(checkpointer, Trained(steps=1), 1)

    (outcome,) = checkpointer.poll()

    assert isinstance(outcome, Saved)
    assert (outcome.step, outcome.checkpoint) == (1, key)
    assert outcome.bytes == sum(
        item.size for item in DirectoryStore(tmp_path / "checkpoints").list(key.removesuffix("manifest.json"))
    ) - len(DirectoryStore(tmp_path / "checkpoints").get(key))
    assert 0 < outcome.stall_seconds <= outcome.seconds
    assert tuple(outcome.stages) == SAVE_STAGES
    assert sum(outcome.stages.values()) <= outcome.seconds
    print(f"stall {outcome.stall_seconds * 1e3:.2f} ms of {outcome.seconds * 1e3:.1f} ms")
    assert checkpointer.poll() == ()


def test_only_what_retention_keeps_stays_and_it_restores(tmp_path: Path) -> None:
    config = a_job(tmp_path, checkpoint={"storage": {"path": str(tmp_path / "checkpoints")}, "retain": {"last": 2}})
    checkpointer, trained = open_checkpointer(config), Trained(steps=1)
    keys = [saved(checkpointer, trained, step) for step in range(1, 6)]

    left = DirectoryStore(tmp_path / "checkpoints").list("checkpoints/")

    steps = {parse_manifest_key(item.key) for item in left} - {None}
    assert steps == {parse_manifest_key(key) for key in keys[-2:]}
    assert {item.key.rpartition("/")[0] for item in left} == {checkpoint_folder(1, 4), checkpoint_folder(1, 5)}
    assert restored(open_checkpointer(config, 2))[0].step == 5


@pytest.mark.parametrize("sharded_before", [False, True])
def test_a_checkpoint_loads_at_other_world_sizes_and_layouts(tmp_path: Path, sharded_before: bool) -> None:
    folder, shard = tmp_path, "full" if sharded_before else "none"
    before = run_ranks(2, on_rank, _train_and_save, folder, shard)
    one, *_ = run_ranks(1, on_rank, _restore, folder, "full", 2)
    three = run_ranks(3, on_rank, _restore, folder, "full", 3)
    _, plain = restored(open_checkpointer(a_job(folder), 4))

    assert before[0][0] == before[1][0] == manifest_key(1, 3)
    for state in (one, *three, plain.state()):
        assert_equal(state, before[0][1])


def _train_and_save(ranks: Ranks, folder: Path, shard: str) -> tuple[str | None, dict[str, np.ndarray]]:
    trained = Trained(steps=2, sharded=shard == "full")
    checkpointer = open_checkpointer(a_job(folder, shard=shard), 1, ranks)
    key = None
    for step in (2, 3):  # the second is written in place
        trained.train(1)
        checkpointer.save(TrainingProgress(step), trained.model, trained.optimizer)
        key = checkpointer.wait()
        assert len(checkpointer.poll()) == (1 if ranks.first else 0)
    state = arrays(trained.state())
    checkpointer.close()
    return key, state


def _restore(ranks: Ranks, folder: Path, shard: str, number: int) -> dict[str, np.ndarray]:
    checkpointer = open_checkpointer(a_job(folder, shard=shard), number, ranks)
    progress, trained = restored(checkpointer, sharded=shard == "full")
    assert progress.step == 3
    return arrays(trained.state())
