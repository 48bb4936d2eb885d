"""The memory that saves are copied to, and the files that it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from pretrain_api.checkpoint.lineage import checkpoint_folder
from pretrain_store.digest import Digest
from pretrain_store.directory import DirectoryStore
from pretrain_store.history import read_manifest
from pretrain_trainer.checkpoint import checkpointer
from pretrain_trainer.checkpoint import restore as restoring
from pretrain_trainer.checkpoint import saver as saving
from pretrain_trainer.checkpoint.dcp import layout, target, writer
from pretrain_trainer.checkpoint.dcp.layout import copy, copy_to_host, write_layout
from pretrain_trainer.checkpoint.dcp.load import ReceivedObject
from pretrain_trainer.checkpoint.dcp.pinned_memory import PinnedMemory, gpus
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.checkpoint.dcp.transfer import broadcast_tensors
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import CheckpointRejectedError
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

FEW_BYTES = 600
"""So that the state of `Trained`, 1.5 kB, takes several files."""
GPUS = frozenset({torch.device("cuda", 0), torch.device("cuda", 1)})


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


class FakeRuntime:
    """CUDA as far as staging needs it: writes down what is asked of it, and answers with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[Any] = []

    def register(self, address: int, size: int) -> int:
        self.asked.append(("register", address, size))
        return self.code

    def unregister(self, address: int) -> None:
        self.asked.append(("unregister", address))

    def wait(self, device: torch.device) -> None:
        self.asked.append(device)


# --- reuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_later_saves_are_copied_to_where_the_first_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew: list[int] = []

    def counted(tensors: Any) -> dict[str, torch.Tensor]:
        anew.append(len(tensors))
        return copy_to_host(tensors)

    monkeypatch.setattr(saving, "copy_to_host", counted)
    checkpointer, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    for step in (1, 2, 3):
        saved(checkpointer, trained, step)
        trained.train(1)

    assert len(anew) == 1


@pytest.mark.usefixtures("alone")
def test_the_first_copies_are_used_up(tmp_path: Path) -> None:
    trained = Trained(steps=1)
    tensors = tensors_of(trained.model, trained.optimizer)
    copies = copy_to_host(tensors)

    laid_out = write_layout(tmp_path, tensors, copies, None)

    assert copies == {}
    assert_equal(dict(laid_out.places), {name: tensor for name, tensor in tensors.items() if tensor.numel()})


# --- several files ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_large_state_takes_several_files_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", FEW_BYTES)
    checkpointer, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    for step in (1, 2):
        trained.train(1)
        key = saved(checkpointer, trained, step)

    objects = read_manifest(DirectoryStore(tmp_path / "checkpoints"), key).objects
    shards = [item for item in objects if item.key.endswith(".distcp")]
    assert len(shards) == 3
    assert_equal(restored(open_checkpointer(a_job(tmp_path), 2))[1].state(), trained.state())


@pytest.mark.usefixtures("alone")
def test_stock_dcp_reads_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", FEW_BYTES)
    trained = Trained(steps=1)
    key = saved(open_checkpointer(a_job(tmp_path)), trained, 1)
    found = {name: torch.zeros_like(tensor) for name, tensor in trained.state().items()}

    load(found, storage_reader=FileSystemReader(tmp_path / "checkpoints" / key.rpartition("/")[0]), no_dist=True)

    assert_equal(found, trained.state())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("damage", ["another byte", "missing", "shorter"])
@pytest.mark.parametrize("read", ["into the state's memory", "from links", "from files"])
def test_damage_to_any_of_the_files_is_found_before_anything_is_loaded(
    read: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", FEW_BYTES)
    if read != "into the state's memory":
        monkeypatch.setattr(target.RestoreTarget, "replaceable", False)
    if read == "from files":
        monkeypatch.setattr(restoring.Scratch, "beside", lambda _: None)
    saved(open_checkpointer(a_job(tmp_path)), Trained(steps=1), 1)
    last = tmp_path / "checkpoints" / checkpoint_folder(1, 1) / "__0_2.distcp"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.unlink()
    if damage != "missing":
        last.write_bytes(content if damage == "another byte" else content[:-1])
    into = Trained(seed=99)
    before = into.state()

    with pytest.raises(CheckpointRejectedError, match=r"__0_2\.distcp"):
        open_checkpointer(a_job(tmp_path), 2).restore(into.model, into.optimizer)
    assert_equal({name: tensor for name, tensor in into.state().items() if name in before}, before)


@pytest.mark.usefixtures("alone")
def test_the_memory_that_a_checkpoint_is_received_in_becomes_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", FEW_BYTES)
    trained, received = Trained(steps=1), list[ReceivedObject]()
    saved(open_checkpointer(a_job(tmp_path)), trained, 1)

    def recorded(size: int) -> ReceivedObject:
        received.append(ReceivedObject(size))
        return received[-1]

    monkeypatch.setattr(restoring, "ReceivedObject", recorded)
    _, again = restored(open_checkpointer(a_job(tmp_path), 2))

    places = [(torch.frombuffer(one.content, dtype=torch.uint8).data_ptr(), len(one.content)) for one in received]
    for name, tensor in tensors_of(again.model, again.optimizer).items():
        assert any(start <= tensor.data_ptr() < start + size for start, size in places), name
    received.clear()
    assert_equal(again.state(), trained.state())
    trained.train(2)
    again.train(2)
    assert_equal(again.state(), trained.state())


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_several_processes_broadcast_what_one_has_loaded(ranks: int, tmp_path: Path) -> None:
    (packed, *_) = run_ranks(ranks, on_rank, _broadcast, tmp_path)

    assert packed == (ranks > 1)


def _broadcast(ranks: Ranks, folder: Path) -> bool:
    packed: list[int] = []

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        packed.append(len(tensors))
        return together(tensors)

    together = torch.cat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", counted)
        tensors = {name: torch.full((2,), float(ranks.rank)) for name in ("one", "other")}
        broadcast_tensors(tensors, 0)
    assert all(tensor.tolist() == [0.0, 0.0] for tensor in tensors.values())
    return bool(packed)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("possible", [True, False])
def test_a_restore_from_a_folder_reads_links_where_it_can_and_leaves_none(
    possible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, job = Trained(steps=1), a_job(tmp_path)
    key = saved(open_checkpointer(job), trained, 1)
    object_ = tmp_path / "checkpoints" / key.replace("manifest.json", "__0_0.distcp")
    links: list[int] = []

    class Watching(DirectoryStore):
        def fetch(self, key: str, path: Path) -> None:
            super().fetch(key, path)
            links.append(object_.stat().st_nlink)

        def receive(self, key: str, into: memoryview) -> Digest:
            links.append(object_.stat().st_nlink)
            return super().receive(key, into)

    monkeypatch.setattr(target.RestoreTarget, "replaceable", False)  # as where the state is on a GPU
    if not possible:
        monkeypatch.setattr(restoring.Scratch, "beside", lambda _: None)
    monkeypatch.setattr(checkpointer, "open_store", lambda *_: Watching(tmp_path / "checkpoints"))

    assert_equal(restored(open_checkpointer(job, 2))[1].state(), trained.state())
    assert max(links) == (2 if possible else 1)
    assert object_.stat().st_nlink == 1
    assert list((tmp_path / "checkpoints" / ".tmp").iterdir()) == []


def test_shards_of_several_ranks_take_several_files_each(tmp_path: Path) -> None:
    before = run_ranks(2, on_rank, _save_in_several_files, tmp_path)[0]
    (after, *_) = run_ranks(3, on_rank, _restore, tmp_path)

    names = {path.name for path in (tmp_path / "checkpoints").rglob("*.distcp")}
    assert {"__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp"} <= names
    assert_equal(after, before)


def _save_in_several_files(ranks: Ranks, folder: Path) -> dict[str, np.ndarray]:
    writer.FILE_BYTES = FEW_BYTES
    trained = Trained(steps=2, sharded=True)
    checkpointer = open_checkpointer(a_job(folder, shard="full"), 1, ranks)
    for step in (2, 3):
        trained.train(1)
        checkpointer.save(TrainingProgress(step), trained.model, trained.optimizer)
        assert checkpointer.wait() is not None
    return arrays(trained.state())


def _restore(ranks: Ranks, folder: Path) -> dict[str, np.ndarray]:
    return arrays(restored(open_checkpointer(a_job(folder, shard="full"), 2, ranks), sharded=True)[1].state())


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_copies_from_gpus_are_waited_for_once_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "gpus", lambda _: GPUS)
    runtime = FakeRuntime()
    sources, targets = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]

    copy(sources, targets, runtime)

    assert set(runtime.asked) == GPUS
    assert len(runtime.asked) == 2
    assert all(torch.equal(one, other) for one, other in zip(sources, targets, strict=True))


def test_without_a_gpu_nothing_is_waited_for() -> None:
    runtime = FakeRuntime()
    copy([torch.ones(2)], [torch.zeros(2)], runtime)

    assert runtime.asked == []


def test_a_scalar_on_the_cpu_does_not_hide_the_gpu_of_the_rest() -> None:
    tensors: Any = [torch.zeros(()), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))]

    assert gpus(tensors) == {torch.device("cuda", 1)}


def test_memory_is_pinned_as_long_as_it_is_there() -> None:
    runtime, memory = FakeRuntime(), torch.zeros(5)
    address = memory.data_ptr()
    pinned = PinnedMemory(memory, runtime)
    del memory

    assert runtime.asked == [("register", address, 20)]
    del pinned
    assert runtime.asked == [("register", address, 20), ("unregister", address)]


def test_memory_that_cuda_does_not_pin_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(code=801)
    with caplog.at_level(logging.WARNING):
        PinnedMemory(torch.zeros(5), runtime)

    assert [kind for kind, *_ in runtime.asked] == ["register"]
    assert "not pinned: CUDA returned error 801" in caplog.text


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("devices", [frozenset(), GPUS])
def test_the_files_of_a_state_on_a_gpu_are_pinned(
    devices: frozenset[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", FEW_BYTES)
    monkeypatch.setattr(layout, "gpus", lambda _: devices)
    monkeypatch.setattr(layout, "PinnedMemory", lambda content: content.nbytes)
    trained = Trained(steps=1)
    tensors = tensors_of(trained.model, trained.optimizer)

    laid_out = write_layout(tmp_path, tensors, {name: tensor.clone() for name, tensor in tensors.items()}, None)

    sizes = [(tmp_path / name).stat().st_size for name in laid_out.files if name.endswith(".distcp")]
    assert sorted(laid_out.pinned) == (sorted(sizes) if devices else [])
