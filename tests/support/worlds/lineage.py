"""A store shared by writers that run the real code one store call at a time, in an order that a test chooses.

Each writer is a thread that stops before every call and waits for its turn, so exactly one thread runs at any time and
a run is a pure function of the turns given.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pretrain_api.checkpoint.lineage import (
    LineageRecord,
    Manifest,
    Rollback,
    StepRange,
    StoredObject,
    checkpoint_folder,
    data_step,
    merged,
    parse_manifest_key,
    parse_record_key,
    record_key,
)
from pretrain_api.spec.job import Retain
from pretrain_store.errors import (
    AllCheckpointsCorrupt,
    CheckpointCorrupt,
    HistoryError,
    ObjectNotFound,
    StoreUnavailable,
)
from pretrain_store.history import commit, put_record, read_listing, read_manifest, retire, sweep
from pretrain_store.lineage import (
    Interventions,
    Listing,
    checkpoint_chain,
    later_record,
    refuse_foreign_job,
    rolled_back,
)
from pretrain_store.parent import ParentChoice, choose_parent, choose_rollback, inherited_interventions
from pretrain_store.port import MultipartUpload, ObjectInfo
from pretrain_store.retention import plan_retention
from support.store.values import MemoryStore, stored

Outcome = Literal["done", "lost", "failed", "late", "killed"]
"""`lost`: it happened, the answer says Unavailable. `failed`: it did not happen. `late`: like failed, happens later."""
T = TypeVar("T")
SHARDS = ("first.distcp", "second.distcp")
EVERY = 6
RETAIN = Retain(last=2, every_steps=EVERY)


class Killed(BaseException):
    """SIGKILL."""


@dataclass(frozen=True)
class Call:
    """A store call that waits for its turn."""

    name: str
    key: str
    act: Callable[[], object]

    @property
    def writes(self) -> bool:
        return self.name in ("put", "delete")


class World:
    """The store, what happened to it, and the checks of what must never happen."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.records: dict[int, LineageRecord] = {}
        """As they were put, whatever became of them."""
        self.trained: dict[str, tuple[int, ...]] = {}
        """Manifest key -> the process that trained step 1, 2, …"""
        self.skipped: dict[str, tuple[StepRange, ...]] = {}
        """Manifest key -> the data that its generation passes over."""
        self.rejected: set[str] = set()
        self.retired: set[str] = set()
        """Manifest keys that were deleted; a late put may bring one back without its objects, behind the newest two."""
        self.corrupted: set[str] = set()
        self.late: list[tuple[Writer, Call]] = []

    def listing(self) -> Listing:
        """Content of the prefix now, with its records as they were put."""
        return Listing(self.records, frozenset(key for key in self.memory.objects if parse_manifest_key(key)))

    def listing_as_read(self) -> Listing:
        """The same without the records that were corrupted since."""
        whole = {
            number: record
            for number, record in self.records.items()
            if self.memory.objects[record_key(number)] == record.to_json().encode()
        }
        return Listing(whole, self.listing().manifests, frozenset(self.records) - frozenset(whole))

    def apply(self, writer: Writer, call: Call) -> object:
        """Let a call happen, and check it."""
        if call.name == "list" and call.key == "lineage/":
            writer.highest_seen = max(self.records, default=0)
            writer.looked = True
        return self._write(writer, call) if call.writes else call.act()

    def _write(self, writer: Writer, call: Call) -> object:
        before = Listing(dict(self.records), self.listing().manifests)
        if call.name == "delete":
            self._check_deletion(writer, call.key, before)
        if call.name == "delete" and parse_manifest_key(call.key):
            self.retired.add(call.key)
        overwritten = self.memory.objects.get(call.key) if call.name == "put" else None
        result = call.act()
        if overwritten is not None and _manifest_beside(call.key) in checkpoint_chain(before):
            assert overwritten == self.memory.objects[call.key] or call.key in self.corrupted, "it was overwritten"
        number = parse_record_key(call.key) if call.name == "put" else None
        if number is not None:
            assert number not in self.records, "two records of one number"
            self.records[number] = LineageRecord.from_json(self.memory.objects[call.key])
        if call.name == "put" and parse_manifest_key(call.key):
            self._check_commit(writer, call.key, before)
        self.check_history()
        return result

    def check_history(self) -> None:
        """The chain is one history: each checkpoint's steps were trained as those of the head were."""
        for listing in (self.listing(), self.listing_as_read()):
            keys = checkpoint_chain(listing)
            steps = [step for _, step in map(_place, keys)]
            assert all(newer > older for newer, older in itertools.pairwise(steps)), keys
            for key, step in zip(keys, steps, strict=True):
                assert len(self.trained[key]) == step
                assert self.trained[key] == self.trained[keys[0]][:step], f"{key} is of another history than {keys[0]}"
                assert data_steps(step, self.skipped[key]) == data_steps(step, self.skipped[keys[0]]), "data was moved"
        as_read = self.listing_as_read()
        assert not rolled_back(as_read) & set(checkpoint_chain(as_read)), "an abandoned checkpoint is in the lineage"

    def _check_commit(self, writer: Writer, key: str, before: Listing) -> None:
        assert before.records[writer.generation].nonce == writer.nonce, "committed under another's number"
        manifest = Manifest.from_json(self.memory.objects[key])
        self.trained[key] = tuple(json.loads(manifest.created_at))
        self.skipped[key] = manifest.skipped
        if writer.generation != before.highest:
            after = checkpoint_chain(self.listing())
            assert after[:1] == checkpoint_chain(before)[:1], "a zombie's commit became the head of the line"

    def _check_deletion(self, writer: Writer, key: str, before: Listing) -> None:
        manifest = _manifest_beside(key)
        generation, step = _place(manifest)
        assert generation <= writer.generation, "a later generation's object was deleted"
        assert writer.highest_seen == writer.generation, "deleted after a later record had been seen"
        if manifest in self.retired:
            pass  # what follows its retirement
        elif manifest == key:
            assert writer.looked, "deleted without a look for later records"
            writer.looked = False
        else:
            assert generation < writer.generation, "a save that may be under way was swept"
        if before.highest != writer.generation or manifest not in before.manifests:
            return  # a stale holder, or no checkpoint
        assert manifest != before.records[before.highest].parent, "the parent of the highest record was deleted"
        refused = {key for record in before.records.values() for key in record.rejected}
        needed = [kept for kept in checkpoint_chain(before) if kept not in refused][:2]
        assert manifest not in needed, "the newest two of the line must stay"
        if not key.endswith("manifest.json"):
            assert manifest not in set(checkpoint_chain(before)) - self.retired, (
                "an object of a committed checkpoint was deleted"
            )
        elif manifest in checkpoint_chain(before):
            assert manifest in refused or step % EVERY, "a multiple was deleted"
        else:
            assert len(needed) == 2, "a last resort was deleted"


class Writer:
    """A process that opens the store for one generation: restores, then saves and tidies up until it must stop."""

    def __init__(
        self,
        world: World,
        generation: int,
        job_uid: str,
        *,
        first: bool,
        nonce: str,
        saves: int,
        diverges: frozenset[int] = frozenset(),
    ) -> None:
        self.world = world
        self.generation = generation
        self.job_uid = job_uid
        self.first = first
        self.nonce = nonce
        self.saves = saves
        self.diverges = diverges
        """After so many saves it rolls back."""
        self.skipped: tuple[StepRange, ...] = ()
        self.highest_seen = 0
        self.looked = False
        """For later records, since its last deletion of a manifest."""
        self.parent: str | None = None
        self.owns = False
        self.ended: BaseException | None = None
        self.pending: Call | None = None
        self._outcome: Outcome = "done"
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._back.acquire()

    def advance(self, outcome: Outcome) -> None:
        """Let the waiting call end like this, and run on to the next one."""
        assert self.pending is not None
        self._outcome = outcome
        self._turn.release()
        self._back.acquire()
        if self.pending is None:
            self._thread.join()
            if self.ended is not None and not isinstance(self.ended, (HistoryError, StoreUnavailable, Killed)):
                raise self.ended

    def call(self, name: str, key: str, act: Callable[[], T]) -> T:
        """Wait for the turn, in the writer's thread."""
        self.pending = Call(name, key, act)
        self._back.release()
        self._turn.acquire()
        call, outcome = self.pending, self._outcome
        if outcome == "killed":
            raise Killed
        if outcome == "failed":
            raise StoreUnavailable("it did not happen")
        if outcome == "late" and call.writes:
            self.world.late.append((self, call))
            raise StoreUnavailable("it may happen later")
        result = self.world.apply(self, call)
        if outcome == "lost":
            raise StoreUnavailable("it happened, the answer was lost")
        return result  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._train()
        except BaseException as error:  # the test's thread raises what it did not expect
            self.ended = error
        finally:
            self.pending = None
            self._back.release()

    def _train(self) -> None:
        store = TurnByTurn(self)
        listing = _again(lambda: read_listing(store))
        refuse_foreign_job(listing, self.job_uid, may_take_over=self.first)
        try:
            choice = choose_parent(listing, self.world.rejected)
        except AllCheckpointsCorrupt as error:
            left = listing.manifests - rolled_back(listing) - set(error.rejected)
            raise AssertionError(f"there was one: {left}") if left else error from None
        left = listing.manifests - rolled_back(listing)
        assert choice.parent is not None or not left, "from nothing, although there are checkpoints"
        assert choice.parent not in rolled_back(listing), "goes on from what a rollback left behind"
        parent = self._manifest(store, choice)
        trained = self._enter(store, choice, inherited_interventions(listing, parent))
        for number in range(self.saves):
            if number in self.diverges:
                trained = self._roll_back(store, trained)
            trained = (*trained, *[100 * int(self.nonce) + number] * 3)
            try:
                self._save(store, trained)
                listing = read_listing(store, listing)
                if later_record(listing, self.generation) is not None:
                    return
                assert self.highest_seen == self.generation, "goes on below a later record"
                retire(store, plan_retention(listing, self.generation, RETAIN))
                sweep(store, self.generation)
            except StoreUnavailable:
                continue  # a failed save is tried again at the next interval

    def _enter(self, store: TurnByTurn, choice: ParentChoice, course: Interventions) -> tuple[int, ...]:
        record = LineageRecord(
            generation=self.generation,
            nonce=self.nonce,
            job_uid=self.job_uid,
            parent=choice.parent,
            world_size=1,
            skipped=course.skipped,
            rollbacks=course.rollbacks,
            rejected=choice.rejected,
            reason="Started",
        )
        _again(lambda: put_record(store, record))
        assert self.highest_seen == self.generation, "goes on below a later record"
        self.parent, self.skipped = choice.parent, course.skipped
        self.owns = True
        try:
            return () if choice.parent is None else _again(lambda: _restore(store, choice.parent or ""))
        except CheckpointCorrupt as error:
            self.world.rejected.add(error.key)
            raise

    def _roll_back(self, store: TurnByTurn, trained: tuple[int, ...]) -> tuple[int, ...]:
        """As if the loss had spiked two steps before the last checkpoint, and this were noticed now."""
        listing = _again(lambda: read_listing(store))
        if later_record(listing, self.generation) is not None:
            raise StoreUnavailable("somebody goes on above this one")
        since = max(1, len(trained) - 2)
        choice = choose_rollback(listing, since)
        parent = self._manifest(store, choice)
        course = inherited_interventions(listing, parent)
        to_step, came = (parent.step, parent.skipped) if parent is not None else (0, ())
        assert to_step < since, "goes back to what was saved after the spike had begun"
        first = max(data_step(to_step, came) + 1, data_step(since, self.skipped))
        skipped = StepRange(first=first, last=first + 2)
        self.generation = listing.highest + 1
        rollback = Rollback(
            generation=self.generation,
            job_uid=self.job_uid,
            cause="LossSpike",
            step=len(trained) + 1,
            since=since,
            to_step=to_step,
            skipped=skipped,
        )
        course = Interventions(merged((*course.skipped, skipped)), (), (*course.rollbacks, rollback))
        return self._enter(store, choice, course)

    def _manifest(self, store: TurnByTurn, choice: ParentChoice) -> Manifest | None:
        try:
            return None if choice.parent is None else _again(lambda: read_manifest(store, choice.parent or ""))
        except CheckpointCorrupt as error:
            self.world.rejected.add(error.key)
            raise

    def _save(self, store: TurnByTurn, trained: tuple[int, ...]) -> None:
        step = len(trained)
        objects: list[StoredObject] = []
        for name in SHARDS:
            data = json.dumps([name, trained]).encode()
            store.put(f"{checkpoint_folder(self.generation, step)}/{name}", data)
            objects.append(stored(name, data))
        manifest = Manifest(
            generation=self.generation,
            step=step,
            tokens=step,
            world_size=1,
            job_uid=self.job_uid,
            skipped=self.skipped,
            objects=tuple(objects),
            created_at=json.dumps(trained),
        )
        _again(lambda: commit(store, manifest))


class TurnByTurn:
    """The store as one writer sees it: every call waits for its turn."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._memory = writer.world.memory

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self._writer.call("put", key, lambda: self._memory.put(key, data, if_absent=if_absent))

    def put_file(self, key: str, path: Path) -> StoredObject:
        raise NotImplementedError

    def get(self, key: str) -> bytes:
        return self._writer.call("get", key, lambda: self._memory.get(key))

    def fetch(self, key: str, path: Path) -> None:
        raise NotImplementedError

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return self._writer.call("list", prefix, lambda: self._memory.list(prefix))

    def delete(self, key: str) -> None:
        self._writer.call("delete", key, lambda: self._memory.delete(key))

    def list_uploads(self, prefix: str) -> tuple[MultipartUpload, ...]:
        return ()

    def abort(self, upload: MultipartUpload) -> None:
        raise NotImplementedError

    def describe(self) -> str:
        return "memory"


def _restore(store: TurnByTurn, key: str) -> tuple[int, ...]:
    manifest = read_manifest(store, key)
    data = b"[]"
    for item in manifest.objects:
        try:
            data = store.get(f"{key.removesuffix('manifest.json')}{item.key}")
        except ObjectNotFound:
            raise CheckpointCorrupt(key, f"{item.key} is missing") from None
        if stored(item.key, data) != item:
            raise CheckpointCorrupt(key, f"{item.key} has another sha256 than was saved")
    return tuple(json.loads(data)[1])


def _again(act: Callable[[], T]) -> T:
    """Retry after a lost answer."""
    try:
        return act()
    except StoreUnavailable:
        return act()


def _manifest_beside(key: str) -> str:
    return f"{key.rpartition('/')[0]}/manifest.json"


def _place(key: str) -> tuple[int, int]:
    place = parse_manifest_key(key)
    assert place is not None, key
    return place


def data_steps(step: int, skipped: tuple[StepRange, ...]) -> list[int]:
    """Data that the steps up to this one were trained on."""
    return [data_step(number, skipped) for number in range(1, step + 1)]
