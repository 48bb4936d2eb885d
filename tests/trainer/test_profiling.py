"""Profiles on demand: a trace of the requested steps of one rank, in the store, while training continues."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pretrain_api.messages.protocol import Command
from pretrain_api.messages.reports import Held, Profiled, ProfileFailed
from pretrain_store.directory import DirectoryStore
from pretrain_trainer.observability.profiler import KEPT, prune
from support.trainer.world import Script, a_corpus, run_training, saving_run


def a_request(name: str, rank: int, steps: int = 2) -> Command:
    return Command(id=name, generation=1, action="profile", steps=steps, rank=rank)


def test_a_rank_records_the_steps_after_the_agreed_one(tmp_path: Path) -> None:
    """Rank 1 alone knows a profile, rank 0 an impossible one and a checkpoint; all are carried out at step 2."""
    store = tmp_path / "store"
    config = saving_run(a_corpus(tmp_path), store, every=100)
    wrong, checkpoint = a_request("wrong", rank=7), Command(id="c1", generation=1)
    orders = {0: {2: (wrong, checkpoint)}, 1: {2: (a_request("p1", rank=1), a_request("p2", rank=1))}}

    first, second = run_training(config, 2, Script(keep=True, orders=orders))

    assert first.step_numbers == [1, 2, 3, 4, 5, 6]
    assert [held.command_id for end in (first, second) for held in end.of(Held)] == ["c1", "c1"]
    assert not first.of(Profiled)
    assert [(failed.command_id, failed.rank) for failed in first.of(ProfileFailed)] == [("wrong", 7)]
    assert "they are 0 to 1" in first.of(ProfileFailed)[0].message
    (said,) = second.of(Profiled)
    assert (said.command_id, said.first_step, said.last_step) == ("p1", 3, 4)
    assert [failed.command_id for failed in second.of(ProfileFailed)] == ["p2"], "one at a time"
    path = store / "profiles/g000001/steps-000000003-000000004-rank-1.json.gz"
    assert (said.location, said.bytes) == (str(path), path.stat().st_size)
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    assert sum(str(name).startswith("Optimizer.step") for name in names) == 1


def test_the_end_of_a_job_ends_the_recording(tmp_path: Path) -> None:
    config = saving_run(a_corpus(tmp_path), tmp_path / "store", every=100)
    orders = {0: {5: (a_request("p1", rank=0, steps=20),)}}

    (end,) = run_training(config, 1, Script(keep=True, orders=orders))

    (said,) = end.of(Profiled)
    assert (said.first_step, said.last_step) == (6, 6)
    assert Path(said.location).stat().st_size == said.bytes


def test_only_the_newest_traces_are_kept(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    keys = [f"profiles/g{number:06d}/steps-000000001-000000002-rank-0.json.gz" for number in range(KEPT + 3)]
    for key in (*keys, "checkpoints/x"):
        store.put(key, b"")

    prune(store)

    assert [item.key for item in store.list("")] == ["checkpoints/x", *keys[3:]]
