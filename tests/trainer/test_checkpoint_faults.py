"""Corruption, crashes, zombies and failing stores: the newest usable checkpoint of the lineage stays current."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from pretrain_api.checkpoint.lineage import Manifest, manifest_key
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_store.directory import DirectoryStore
from pretrain_store.history import read_listing
from pretrain_store.lineage import checkpoint_chain
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    InvalidInput,
    NoUsableCheckpointError,
    NumberTakenError,
    SupersededError,
)
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks, process_group
from support.store.values import an_identity, stored
from support.trainer.checkpoint import (
    Trained,
    a_flaky_store,
    a_job,
    assert_equal,
    on_rank,
    open_checkpointer,
    restored,
    saved,
)
from support.trainer.world import run_ranks

FILES = (".metadata", "__0_0.distcp")


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


def two_checkpoints(folder: Path) -> tuple[Trained, str, str]:
    """The state of step 1, and the keys of checkpoints of steps 1 and 2."""
    checkpointer, trained = open_checkpointer(a_job(folder)), Trained(steps=1)
    first = saved(checkpointer, trained, 1)
    other = Trained(seed=2, steps=2)
    return trained, first, saved(checkpointer, other, 2)


def object_path(folder: Path, key: str, name: str) -> Path:
    """Path of an object of a checkpoint."""
    return folder / "checkpoints" / key.removesuffix("manifest.json") / name


def flip_a_byte(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_corrupt_byte_is_found_before_anything_is_loaded(tmp_path: Path, name: str, place: float) -> None:
    trained, _, newest = two_checkpoints(tmp_path)
    flip_a_byte(object_path(tmp_path, newest, name), place)
    checkpointer, target = open_checkpointer(a_job(tmp_path), 2), Trained(seed=99)
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}

    with pytest.raises(CheckpointRejectedError) as rejected:
        checkpointer.restore(target.model, target.optimizer)

    assert rejected.value.key == newest
    assert name in rejected.value.message
    assert_equal(target.model.state_dict(), before)

    progress, again = restored(open_checkpointer(a_job(tmp_path), 3, rejected=(newest,)))
    assert progress.step == 1
    assert_equal(again.state(), trained.state())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_object_is_damage(tmp_path: Path, name: str) -> None:
    _, first, newest = two_checkpoints(tmp_path)
    object_path(tmp_path, newest, name).unlink()

    with pytest.raises(CheckpointRejectedError) as rejected:
        restored(open_checkpointer(a_job(tmp_path), 2))

    assert rejected.value.key == newest
    assert open_checkpointer(a_job(tmp_path), 3, rejected=(newest,)).parent is not None
    with pytest.raises(NoUsableCheckpointError):
        open_checkpointer(a_job(tmp_path), 4, rejected=(first, newest))


def test_an_unreadable_manifest_is_damage(tmp_path: Path) -> None:
    _, _, newest = two_checkpoints(tmp_path)
    object_path(tmp_path, newest, "manifest.json").write_text("{")

    with pytest.raises(CheckpointRejectedError) as rejected:
        open_checkpointer(a_job(tmp_path), 2)

    assert rejected.value.key == newest


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def test_a_malicious_pickle_with_a_right_digest_is_never_executed(tmp_path: Path) -> None:
    _, _, newest = two_checkpoints(tmp_path)
    evil = pickle.dumps(Payload(tmp_path / "executed"))
    object_path(tmp_path, newest, ".metadata").write_bytes(evil)
    path = object_path(tmp_path, newest, "manifest.json")
    manifest = Manifest.from_json(path.read_bytes())
    objects = tuple(stored(".metadata", evil) if item.key == ".metadata" else item for item in manifest.objects)
    path.write_text(manifest.model_copy(update={"objects": objects}).to_json())

    with pytest.raises(CheckpointRejectedError, match="not allowed"):
        restored(open_checkpointer(a_job(tmp_path), 2))

    assert not (tmp_path / "executed").exists()
    pickle.loads(evil)
    assert (tmp_path / "executed").exists(), "the payload works where nothing stops it"


def test_all_ranks_reject_what_one_found_damaged(tmp_path: Path) -> None:
    run_ranks(2, on_rank, _save_sharded, tmp_path)
    key = manifest_key(1, 1)
    flip_a_byte(object_path(tmp_path, key, "__1_0.distcp"), 0.5)

    rejections = run_ranks(2, on_rank, _rejected, tmp_path)

    assert [found for found, _ in rejections] == [key, key]
    assert all("__1_0.distcp" in message for _, message in rejections)


def _save_sharded(ranks: Ranks, folder: Path) -> None:
    saved(open_checkpointer(a_job(folder, shard="full"), 1, ranks), Trained(steps=1, sharded=True), 1)


def _rejected(ranks: Ranks, folder: Path) -> tuple[str, str]:
    checkpointer = open_checkpointer(a_job(folder, shard="full"), 2, ranks)
    with pytest.raises(CheckpointRejectedError) as rejected:
        restored(checkpointer, sharded=True)
    return rejected.value.key, rejected.value.message


def test_an_unattended_run_takes_the_next_number_and_skips_corrupt_checkpoints(tmp_path: Path) -> None:
    trained, first, newest = two_checkpoints(tmp_path)
    flip_a_byte(object_path(tmp_path, newest, FILES[1]), 0.5)
    checkpointer = open_checkpointer(a_job(tmp_path), None)

    progress, again = restored(checkpointer)
    key = saved(checkpointer, again, 2)

    assert progress.step == 1
    assert_equal(again.state(), trained.state())
    listing = read_listing(DirectoryStore(tmp_path / "checkpoints"))
    assert listing.records[3].rejected == (newest,)
    assert checkpoint_chain(listing) == (key, first)


# --- crashes and zombies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files_put", [0, 1])
def test_a_kill_during_a_save_leaves_the_checkpoint_before_current(tmp_path: Path, files_put: int) -> None:
    trained = Trained(steps=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain_trainer.loop.train", "torch._dynamo", "support.trainer.world"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_stall_in_a_save, args=(tmp_path, files_put, theirs))
    process.start()
    try:
        assert mine.poll(60)
        assert mine.recv() == "stalled"
    finally:
        process.kill()
        process.join()

    progress, again = restored(open_checkpointer(a_job(tmp_path), 2))

    assert progress.step == 1
    assert_equal(again.state(), trained.state())
    left = DirectoryStore(tmp_path / "checkpoints").list("checkpoints/g000001/step-000000002/")
    assert len(left) == files_put


def _stall_in_a_save(folder: Path, files_put: int, pipe: Connection) -> None:
    with process_group(Environment.of({})), pytest.MonkeyPatch.context() as patch:
        store = a_flaky_store(folder, patch)
        checkpointer, trained = open_checkpointer(a_job(folder)), Trained(steps=1)
        saved(checkpointer, trained, 1)
        store.gate.clear()
        store.passes = files_put
        checkpointer.save(TrainingProgress(2), trained.model, trained.optimizer)
        assert store.stalled.wait(60)
        pipe.send("stalled")
        checkpointer.wait()


def test_what_a_killed_save_left_behind_is_swept_by_a_later_generation(tmp_path: Path) -> None:
    _, first, _ = two_checkpoints(tmp_path)
    store = DirectoryStore(tmp_path / "checkpoints")
    store.put("checkpoints/g000001/step-000000003/__0_0.distcp", b"half")

    later = open_checkpointer(a_job(tmp_path), 2)
    saved(later, restored(later)[1], 4)

    keys = [item.key for item in store.list("checkpoints/")]
    assert not [key for key in keys if "step-000000003" in key]
    assert first in keys


def test_the_late_commit_of_a_zombie_is_on_no_line_and_the_zombie_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_flaky_store(tmp_path, monkeypatch)
    zombie, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    first = saved(zombie, trained, 1)
    store.gate.clear()
    zombie.save(TrainingProgress(2), trained.model, trained.optimizer)
    assert store.stalled.wait(60)

    successor = open_checkpointer(a_job(tmp_path), 2)  # while the zombie's save is under way
    store.gate.set()
    with pytest.raises(SupersededError, match="generation 2"):
        zombie.wait()
    listing = read_listing(store)
    second = saved(successor, trained, 3)

    assert manifest_key(1, 2) in listing.manifests, "its commit did happen"
    assert checkpoint_chain(listing) == (first,)
    assert checkpoint_chain(read_listing(store)) == (second, first)
    assert [type(outcome) for outcome in zombie.poll()] == [Saved, Saved]
    with pytest.raises(SupersededError):
        zombie.poll()
    with pytest.raises(SupersededError):
        zombie.save(TrainingProgress(4), trained.model, trained.optimizer)


# --- failing stores ---------------------------------------------------------------------------------------------------


def test_a_store_that_is_down_fails_the_save_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_flaky_store(tmp_path, monkeypatch)
    checkpointer, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    saved(checkpointer, trained, 1)
    checkpointer.poll()
    store.down = True
    checkpointer.save(TrainingProgress(2), trained.model, trained.optimizer)

    assert checkpointer.wait() is None
    (outcome,) = checkpointer.poll()
    assert isinstance(outcome, SaveFailed)
    assert (outcome.step, "no route to the store" in outcome.message) == (2, True)

    store.down = False
    assert saved(checkpointer, trained, 2) == manifest_key(1, 2)
    trained.train(1)
    assert saved(checkpointer, trained, 3) == manifest_key(1, 3)
    assert_equal(restored(open_checkpointer(a_job(tmp_path), 2))[1].state(), trained.state())


def test_when_one_rank_cannot_save_its_shards_the_save_fails_for_all_and_the_next_one_works(tmp_path: Path) -> None:
    ends = run_ranks(2, on_rank, _fail_on_rank_one, tmp_path)

    failed, succeeded, message = ends[0]
    assert failed is None
    assert succeeded == manifest_key(1, 3)
    assert message == "rank 1: no route to the store"
    assert ends[1] == (None, succeeded, None)


def _fail_on_rank_one(ranks: Ranks, folder: Path) -> tuple[str | None, str | None, str | None]:
    with pytest.MonkeyPatch.context() as patch:
        store = a_flaky_store(folder, patch)
        trained = Trained(steps=1, sharded=True)
        checkpointer = open_checkpointer(a_job(folder, shard="full"), 1, ranks)
        saved(checkpointer, trained, 1)
        checkpointer.poll()
        store.down = not ranks.first
        checkpointer.save(TrainingProgress(2), trained.model, trained.optimizer)
        failed, outcomes = checkpointer.wait(), checkpointer.poll()
        store.down = False
        succeeded = saved(checkpointer, trained, 3)
    return failed, succeeded, outcomes[0].message if ranks.first else None


def test_a_save_of_the_same_step_is_joined_and_of_another_step_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_flaky_store(tmp_path, monkeypatch)
    checkpointer, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    store.gate.clear()
    checkpointer.save(TrainingProgress(1), trained.model, trained.optimizer)
    assert store.stalled.wait(60)

    checkpointer.save(TrainingProgress(1), trained.model, trained.optimizer)
    checkpointer.save(TrainingProgress(2), trained.model, trained.optimizer)
    (skipped,) = checkpointer.poll()
    store.gate.set()
    key = checkpointer.wait()
    checkpointer.save(TrainingProgress(1), trained.model, trained.optimizer)

    assert skipped == SaveFailed(step=2, message="the save of step 1 was still under way")
    assert key == checkpointer.wait() == manifest_key(1, 1)
    assert [outcome.step for outcome in checkpointer.poll()] == [1]


def test_saving_a_step_again_after_a_lost_answer_is_no_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_flaky_store(tmp_path, monkeypatch)
    checkpointer, trained = open_checkpointer(a_job(tmp_path)), Trained(steps=1)
    put = store.put

    def put_and_lose_the_answer(key: str, data: bytes, *, if_absent: bool = False) -> None:
        put(key, data, if_absent=if_absent)
        raise TimeoutError("no answer")

    monkeypatch.setattr(store, "put", put_and_lose_the_answer)
    checkpointer.save(TrainingProgress(1), trained.model, trained.optimizer)
    assert checkpointer.wait() is None
    monkeypatch.setattr(store, "put", put)

    assert saved(checkpointer, trained, 1) == manifest_key(1, 1)


# --- entering a prefix ------------------------------------------------------------------------------------------------


def test_a_number_that_is_taken_is_refused_with_the_highest(tmp_path: Path) -> None:
    open_checkpointer(a_job(tmp_path), 5)

    with pytest.raises(NumberTakenError) as taken:
        open_checkpointer(a_job(tmp_path), 3)

    assert taken.value.highest == 5


def test_a_prefix_of_another_model_is_refused_with_field_and_remedy(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    before = DirectoryStore(tmp_path / "checkpoints").list("")

    with pytest.raises(InvalidInput, match=r"belongs to another job \(model differs\).*checkpoint\.storage"):
        open_checkpointer(a_job(tmp_path), 2, identity=an_identity(model_digest="another"))

    assert DirectoryStore(tmp_path / "checkpoints").list("") == before


def test_only_a_first_generation_may_take_over_the_prefix_of_another_job(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    other = a_job(tmp_path, job_uid="uid-2")

    with pytest.raises(SupersededError):
        open_checkpointer(other, 2, first=False)
    taken = open_checkpointer(other, 2, first=True)

    assert restored(taken)[0].step == 2


def test_a_path_that_is_a_file_is_refused_with_the_field(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")

    with pytest.raises(InvalidInput, match=r"checkpoint\.storage"):
        open_checkpointer(a_job(tmp_path))


def test_all_ranks_learn_that_the_number_is_taken_and_wait_gives_all_the_same_key(tmp_path: Path) -> None:
    assert run_ranks(2, on_rank, _enter_twice, tmp_path) == [(manifest_key(4, 1), 4)] * 2


def _enter_twice(ranks: Ranks, folder: Path) -> tuple[str, int]:
    checkpointer = open_checkpointer(a_job(folder), 4, ranks)
    key = saved(checkpointer, Trained(steps=1), 1)
    with pytest.raises(NumberTakenError) as taken:
        open_checkpointer(a_job(folder), 4, ranks)
    return key, taken.value.highest


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_checkpoints_go_through_s3(tmp_path: Path) -> None:
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environ = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        endpoint = f"http://{host}:{port}"
        _make_bucket(endpoint, environ)
        storage = {"s3": {"bucket": "checkpoints", "prefix": "run/1", "endpoint": endpoint}}
        config = a_job(tmp_path, checkpoint={"storage": storage})
        trained = Trained(steps=1)
        first = open_checkpointer(config, environ=environ)
        for step in (1, 2):
            trained.train(1)
            saved(first, trained, step)

        progress, again = restored(open_checkpointer(config, 2, environ=environ))
    finally:
        server.stop()

    assert progress.step == 2
    assert_equal(again.state(), trained.state())


def _make_bucket(endpoint: str, environ: dict[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket="checkpoints")
