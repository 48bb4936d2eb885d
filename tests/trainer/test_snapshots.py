"""States in the memory of workers: what is restored after which failure, and that it is one history."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import LineageRecord, MemoryState, manifest_key
from pretrain_api.messages.reports import SaveFailed
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.job import Memory
from pretrain_api.spec.model import Model, resolve
from pretrain_api.spec.training import Optimizer as OptimizerConfig
from pretrain_api.spec.training import Parallelism
from pretrain_sdk.scratch import MEMORY_VARIABLE
from pretrain_store.directory import DirectoryStore
from pretrain_store.history import read_listing
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.checkpoint.dcp.layout import local_part
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.checkpoint.memory import snapshots
from pretrain_trainer.checkpoint.memory.plan import MemoryInventory, choose_snapshot
from pretrain_trainer.checkpoint.memory.snapshots import Seal, SnapshotWriter, StatePart, is_intact, sealed_snapshots
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.mesh import Mesh
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks, process_group
from pretrain_trainer.models.decoder import Decoder, skeleton
from pretrain_trainer.models.optimizer import build_optimizer
from pretrain_trainer.parallelism.parallelize import Groups, initialise_part, lay_out
from support.operator.world import a_step
from support.store.values import a_record
from support.trainer.checkpoint import Trained, a_job, arrays, assert_equal, on_rank, open_checkpointer, restored, saved
from support.trainer.world import run_ranks


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


# --- a worker's own ---------------------------------------------------------------------------------------------------


def snapshots_of(folder: Path, record: LineageRecord | None = None) -> SnapshotWriter:
    return SnapshotWriter(folder, 0, record or a_record(3), StatePart(0, 1))


def take(taking: SnapshotWriter, trained: Trained, step: int) -> None:
    taking.take(TrainingProgress(step, 10 * step), tensors_of(trained.model, trained.optimizer))
    taking.join()


def steps_in(folder: Path) -> list[int]:
    return sorted(seal.state.step for _, seal in sealed_snapshots(folder))


@pytest.mark.usefixtures("alone")
def test_two_states_are_kept_in_turn_and_both_are_intact(tmp_path: Path) -> None:
    taking, trained = snapshots_of(tmp_path), Trained(steps=1)
    for step in range(1, 6):
        take(taking, trained, step)

    assert steps_in(tmp_path) == [4, 5]
    assert all(is_intact(path, seal) for path, seal in sealed_snapshots(tmp_path))
    assert {seal.tokens for _, seal in sealed_snapshots(tmp_path)} == {40, 50}


@pytest.mark.usefixtures("alone")
def test_a_state_that_is_being_written_over_does_not_count_and_the_one_before_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, trained = snapshots_of(tmp_path), Trained(steps=1)
    for step in (1, 2):
        take(taking, trained, step)

    monkeypatch.setattr(snapshots, "stored_object", _killed)
    taking.take(TrainingProgress(3), tensors_of(trained.model, trained.optimizer))
    taking.settle()

    assert steps_in(tmp_path) == [2]
    with pytest.raises(ValueError, match="killed"):
        taking.join()


def _killed(*_: object) -> None:
    raise ValueError("killed while digesting")


@pytest.mark.usefixtures("alone")
def test_what_earlier_generations_left_goes_with_the_second_state_of_a_new_one(tmp_path: Path) -> None:
    trained = Trained(steps=1)
    take(snapshots_of(tmp_path), trained, 7)
    taking = snapshots_of(tmp_path, a_record(4))

    take(taking, trained, 8)
    assert steps_in(tmp_path) == [7, 8], "another worker may not have sealed its first yet"
    take(taking, trained, 9)
    assert steps_in(tmp_path) == [8, 9]


def a_seal(part: int, parts: int, step: int) -> Seal:
    state = MemoryState(generation=1, nonce="n", step=step)
    return Seal(state=state, tokens=0, part=part, parts=parts, objects=())


def test_the_newest_state_is_chosen_of_which_all_parts_are_there() -> None:
    said = [
        MemoryInventory(0, (a_seal(0, 2, 10), a_seal(0, 2, 20), a_seal(0, 2, 30))),
        MemoryInventory(1, (a_seal(1, 2, 10), a_seal(1, 2, 20))),
    ]

    chosen = choose_snapshot(said, lambda state: True)
    assert chosen is not None
    assert (chosen.state.step, chosen.holders) == (20, ((0,), (1,)))
    assert chosen.without([(1, 1)]) is None
    other = choose_snapshot(said, lambda state: state.step != 20)
    assert other is not None
    assert other.state.step == 10
    assert choose_snapshot(said[:1], lambda state: True) is None


def test_of_replicated_state_one_intact_copy_is_enough() -> None:
    chosen = choose_snapshot([MemoryInventory(rank, (a_seal(0, 1, 10),)) for rank in range(3)], lambda state: True)

    assert chosen is not None
    assert chosen.everywhere
    left = chosen.without([(0, 0), (2, 0)])
    assert left is not None
    assert not left.everywhere
    assert left.holders == ((1,),)


# --- through the checkpointer -----------------------------------------------------------------------------------------


def a_remembering_job(folder: Path, **fields: str) -> TrainerConfig:
    job = a_job(folder, **fields)
    checkpoint = job.checkpoint.model_copy(update={"memory": Memory(every_steps=1)})
    return job.model_copy(update={"checkpoint": checkpoint})


def memory_of(folder: Path, worker: int) -> Path:
    """The folder in memory of a worker."""
    path = folder / f"worker-{worker}"
    path.mkdir(exist_ok=True)
    return path


def in_worker(folder: Path, worker: int) -> Mapping[str, str]:
    """The environment of the one process of a worker."""
    return {MEMORY_VARIABLE: str(memory_of(folder, worker)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def lose(folder: Path, worker: int) -> None:
    """The worker is gone; another one takes its place."""
    shutil.rmtree(memory_of(folder, worker))


def corrupt(folder: Path, worker: int) -> None:
    """Flip a byte in the middle of every file of a worker's states."""
    for path in memory_of(folder, worker).glob("*/*.distcp"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def remember(checkpointer: Checkpointer, trained: Trained, *steps: int) -> None:
    """Train one step each, and keep the states in memory."""
    for step in steps:
        trained.train(1)
        checkpointer.remember(
            TrainingProgress(step, 10 * step, lately=(a_step(step),)), trained.model, trained.optimizer
        )
    checkpointer.settle_memory()
    assert not [said for said in checkpointer.poll() if isinstance(said, SaveFailed)]


def records(folder: Path) -> Mapping[int, LineageRecord]:
    return read_listing(DirectoryStore(folder / "checkpoints")).records


@pytest.mark.usefixtures("alone")
def test_steps_after_the_last_checkpoint_are_recovered_and_the_record_says_from_what(tmp_path: Path) -> None:
    trained, job, environ = Trained(), a_remembering_job(tmp_path), in_worker(tmp_path, 0)
    first = open_checkpointer(job, 1, environ=environ)
    trained.train(1)
    parent = saved(first, trained, 1)
    remember(first, trained, 2, 3)

    second = open_checkpointer(job, 2, environ=environ)
    progress, again = restored(second)

    assert (progress, second.recalled) == (TrainingProgress(3, 30, lately=(a_step(3),)), True)
    assert_equal(again.state(), trained.state())
    record = records(tmp_path)[2]
    assert record.parent == parent
    assert record.resumed == MemoryState(generation=1, nonce=records(tmp_path)[1].nonce, step=3)

    third = open_checkpointer(job, 3, environ=environ)
    progress, again = restored(third)
    assert progress.step == 3, "a second failure before generation 2 kept anything"
    assert_equal(again.state(), trained.state())

    remember(third, again, 4)
    saved(third, again, 4)
    progress, _ = restored(open_checkpointer(job, 4, environ=environ))
    assert progress.step == 4
    assert records(tmp_path)[4].parent == manifest_key(3, 4)


@pytest.mark.usefixtures("alone")
def test_a_stale_state_is_never_used_whatever_its_step(tmp_path: Path) -> None:
    trained, job, environ = Trained(), a_remembering_job(tmp_path), in_worker(tmp_path, 0)
    zombie = open_checkpointer(job, 1, environ=environ)
    trained.train(1)
    saved(zombie, trained, 1)
    remember(zombie, trained, 2, 3, 4)
    aside = shutil.copytree(memory_of(tmp_path, 0), tmp_path / "aside")

    lose(tmp_path, 0)
    progress, _ = restored(open_checkpointer(job, 2, environ=environ))
    assert progress.step == 1
    memory_of(tmp_path, 0)
    shutil.copytree(aside, memory_of(tmp_path, 0), dirs_exist_ok=True)
    assert steps_in(memory_of(tmp_path, 0)) == [3, 4]

    third = open_checkpointer(job, 3, environ=environ)
    progress, _ = restored(third)
    assert (progress.step, third.recalled) == (1, False)
    assert steps_in(memory_of(tmp_path, 0)) == []


@pytest.mark.usefixtures("alone")
def test_a_corrupt_state_is_found_before_it_is_named_and_the_checkpoint_is_used(tmp_path: Path) -> None:
    trained, job, environ = Trained(), a_remembering_job(tmp_path), in_worker(tmp_path, 0)
    first = open_checkpointer(job, 1, environ=environ)
    trained.train(1)
    before = trained.state()
    saved(first, trained, 1)
    remember(first, trained, 2, 3)
    corrupt(tmp_path, 0)

    second = open_checkpointer(job, 2, environ=environ)
    progress, again = restored(second)

    assert (progress.step, second.recalled) == (1, False)
    assert_equal(again.state(), before)
    assert records(tmp_path)[2].resumed is None


@pytest.mark.usefixtures("alone")
def test_too_little_memory_is_reported_once_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = open_checkpointer(a_remembering_job(tmp_path), 1, environ=in_worker(tmp_path, 0))
    trained = Trained(steps=1)
    monkeypatch.setattr(snapshots, "_SPARE", 1 << 60)

    for step in (1, 2):
        assert checkpointer.remember(TrainingProgress(step), trained.model, trained.optimizer) == 0.0
    (said,) = checkpointer.poll()

    assert isinstance(said, SaveFailed)
    assert "enlarge it, or leave checkpoint.memory out" in said.message


def test_replicated_state_is_recovered_while_any_worker_has_it(tmp_path: Path) -> None:
    results = run_ranks(3, on_rank, _replicated_story, tmp_path)

    kept = results[0][0]
    for _, story in results:
        assert [(step, recalled) for step, recalled, _ in story] == [(3, True), (3, True), (4, True), (1, False)]
        for step, _, state in story:
            assert_equal(state, kept[step])


State = dict[str, np.ndarray]


def _replicated_story(ranks: Ranks, folder: Path) -> tuple[dict[int, State], list[tuple[int, bool, State]]]:
    """The states as they were kept, by step; and what each later generation restored."""
    job, environ = a_remembering_job(folder), in_worker(folder, ranks.rank)
    trained, kept, story = Trained(steps=1), dict[int, State](), list[tuple[int, bool, State]]()
    checkpointer = open_checkpointer(job, 1, ranks, environ=environ)
    saved(checkpointer, trained, 1)
    kept[1] = arrays(trained.state())
    remember(checkpointer, trained, 2, 3)
    kept[3] = arrays(trained.state())

    def resumes(number: int) -> None:
        nonlocal checkpointer, trained
        checkpointer = open_checkpointer(job, number, ranks, environ=environ)
        progress, trained = restored(checkpointer)
        story.append((progress.step, checkpointer.recalled, arrays(trained.state())))

    resumes(2)  # a rank's process was killed
    if ranks.rank == 0:
        lose(folder, 0)
    environ = in_worker(folder, ranks.rank)
    resumes(3)  # then the worker of rank 0, before anything was kept again
    remember(checkpointer, trained, 4)
    kept[4] = arrays(trained.state())
    if ranks.rank == 1:
        lose(folder, 1)
    if ranks.rank == 0:
        corrupt(folder, 0)
    environ = in_worker(folder, ranks.rank)
    resumes(4)  # a worker was lost and another one's memory is damaged
    lose(folder, ranks.rank)
    environ = in_worker(folder, ranks.rank)
    resumes(5)  # all were lost
    return kept, story


def test_shards_are_recovered_when_all_survive_at_any_number_of_workers_else_the_store_is_used(tmp_path: Path) -> None:
    first = run_ranks(2, on_rank, _keep_shards, tmp_path)
    survived = run_ranks(2, on_rank, _restore_shards, tmp_path, 2)
    grown = run_ranks(3, on_rank, _restore_shards, tmp_path, 3)
    lose(tmp_path, 1)
    lost = run_ranks(2, on_rank, _restore_shards, tmp_path, 4)

    for step, recalled, state in (*survived, *grown):
        assert (step, recalled) == (3, True)
        assert_equal(state, first[0])
    for step, recalled, _ in lost:
        assert (step, recalled) == (1, False)
    assert records(tmp_path)[4].resumed is None


def _keep_shards(ranks: Ranks, folder: Path) -> State:
    trained = Trained(steps=1, sharded=True)
    environ = in_worker(folder, ranks.rank)
    checkpointer = open_checkpointer(a_remembering_job(folder, shard="full"), 1, ranks, environ=environ)
    saved(checkpointer, trained, 1)
    remember(checkpointer, trained, 2, 3)
    return arrays(trained.state())


def _restore_shards(ranks: Ranks, folder: Path, number: int) -> tuple[int, bool, State]:
    environ = in_worker(folder, ranks.rank)
    checkpointer = open_checkpointer(a_remembering_job(folder, shard="full"), number, ranks, environ=environ)
    progress, trained = restored(checkpointer, sharded=True)
    return progress.step, checkpointer.recalled, arrays(trained.state())


@pytest.mark.parametrize(
    ("parallelism", "worker_size", "of_the_others"),
    [
        ({"shard": "hybrid"}, 2, {0, 1}),
        ({"tensor": 2}, 1, {1, 2}),
        ({"pipeline": 2}, 1, {0}),
        ({"shard": "full", "tensor": 2}, 1, set()),
    ],
    ids=["hybrid", "tensor", "pipeline", "sharded and tensor"],
)
def test_parts_of_a_model_are_recovered_while_each_is_on_some_worker(
    tmp_path: Path, parallelism: dict[str, Any], worker_size: int, of_the_others: set[int]
) -> None:
    """`of_the_others`: ranks whose workers may be lost together, for other workers have the same parts."""
    story = (tmp_path, parallelism, sorted({rank // worker_size for rank in of_the_others}))

    results = run_ranks(4, on_rank, _story_of_parts, *story, worker_size=worker_size)

    for kept, found in results:
        assert [(step, recalled) for step, recalled, _ in found] == [(3, True), (1, False)]
        for step, _, state in found:
            assert_equal(state, kept[step])


def _story_of_parts(
    ranks: Ranks, folder: Path, parallelism: dict[str, Any], lost: Sequence[int]
) -> tuple[dict[int, State], list[tuple[int, bool, State]]]:
    """This rank's parts as they were kept, by step; and what was restored with workers lost, then all."""
    job = a_remembering_job(folder)
    training = job.training.model_copy(update={"parallelism": Parallelism.model_validate(parallelism)})
    job = job.model_copy(update={"training": training})
    worker, local_rank = divmod(ranks.rank, ranks.worker_size)
    memory = memory_of(folder, worker)
    environ = {**in_worker(folder, worker), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(ranks.worker_size)}
    groups = Groups.over(
        Mesh.of(training.parallelism, 4, ranks.worker_size), ranks, training.parallelism.shard != "none", True
    )
    kept, found = dict[int, State](), list[tuple[int, bool, State]]()

    checkpointer = open_checkpointer(job, 1, ranks, environ=environ)
    model, optimizer = a_part(groups, seed=1)
    for step in (1, 2, 3):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        kept[step] = parts(model, optimizer)
        if step == 1:
            checkpointer.save(TrainingProgress(1, 10), model, optimizer)
            assert checkpointer.wait() is not None
        else:
            checkpointer.remember(TrainingProgress(step, 10 * step), model, optimizer)
            checkpointer.settle_memory()
    torch.distributed.barrier()
    for number, gone in ((2, lost), (3, range(4))):
        if worker in gone and local_rank == 0:
            shutil.rmtree(memory)
            memory.mkdir()
        torch.distributed.barrier()
        checkpointer = open_checkpointer(job, number, ranks, environ=environ)
        model, optimizer = a_part(groups, seed=2)
        progress = checkpointer.restore(model, optimizer)
        found.append((progress.step, checkpointer.recalled, parts(model, optimizer)))
    return kept, found


def a_part(groups: Groups, seed: int) -> tuple[Decoder, Optimizer]:
    """This rank's part of a model, and its optimizer."""
    model = skeleton(resolve(Model(family="gpt2", layers=2, heads=2, width=32, context=16)), 64)
    lay_out(model, groups, bf16=False, exact=False)
    model.to_empty(device="cpu")
    initialise_part(model, seed)
    return model, build_optimizer(model, OptimizerConfig())


def parts(model: Decoder, optimizer: Optimizer) -> State:
    return arrays({name: local_part(tensor).clone() for name, tensor in tensors_of(model, optimizer).items()})
