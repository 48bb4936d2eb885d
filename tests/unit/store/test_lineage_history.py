"""Invariant: the chain is one history, and nothing that it needs is deleted, in any order of events.

Writers run the real code, interleaved at single store calls: zombies, races for a number, lost answers, late puts and
deletes, kills, restarts, corrupt objects, manifests and records, rollbacks, a second job that takes the prefix over.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pretrain_api.checkpoint.lineage import manifest_key, parse_manifest_key
from pretrain_store.errors import AllCheckpointsCorrupt, CheckpointCorrupt, ObjectExists
from pretrain_store.lineage import checkpoint_chain
from pretrain_store.parent import choose_parent
from support.worlds.lineage import World, Writer

MOST_WRITERS = 5
ENOUGH_CALLS = 10_000


class History(RuleBasedStateMachine):
    """A world with a few writers at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.writers: list[Writer] = []
        self.nonces = itertools.count()

    @initialize(saves=st.integers(0, 4))
    def a_job_has_run(self, saves: int) -> None:
        self.run_to_the_end(self.writer(1, first=True, saves=saves))

    @precondition(lambda self: len(self.alive) < MOST_WRITERS)
    @rule(
        ahead=st.sampled_from([0, 1, 1, 1, 2]),
        other=st.sampled_from([False, False, True]),
        first=st.booleans(),
        diverges=st.frozensets(st.integers(0, 4), max_size=2),
    )
    def a_process_starts(self, ahead: int, other: bool, first: bool, diverges: frozenset[int]) -> None:
        """Its number is the next one as a rule, another's at times. Its loss may diverge: then it rolls back."""
        taken = max(self.world.records, default=0)
        number, uid = max(1, taken + ahead), "other" if other else "job"
        self.writer(number, job_uid=uid, first=first or not other, saves=5, diverges=diverges)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), calls=st.integers(1, 25))
    def a_process_makes_its_next_call(self, data: st.DataObject, calls: int) -> None:
        writer = data.draw(st.sampled_from(self.alive))
        for _ in range(calls):
            if writer.pending is not None:
                writer.advance("done")

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "lost", "failed", "late", "late", "killed"]))
    def a_call_goes_wrong(self, data: st.DataObject, outcome: str) -> None:
        data.draw(st.sampled_from(self.alive)).advance(outcome)  # type: ignore[arg-type]

    @precondition(lambda self: any(writer.owns for writer in self.alive))
    @rule(data=st.data(), outcome=st.sampled_from(["lost", "late", "killed"]))
    def a_process_runs_to_its_commit(self, data: st.DataObject, outcome: str) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.alive if writer.owns]))
        while writer.pending is not None and not (
            writer.pending.name == "put" and writer.pending.key.endswith("manifest.json")
        ):
            writer.advance("done")
        if writer.pending is not None:
            writer.advance(outcome)  # type: ignore[arg-type]

    @precondition(lambda self: self.world.late)
    @rule(data=st.data())
    def a_late_put_happens(self, data: st.DataObject) -> None:
        late = data.draw(st.sampled_from(range(len(self.world.late))))
        writer, call = self.world.late.pop(late)
        if call.name == "delete":  # what was late is not checked: the world has changed since it was decided
            self.world.retired.add(call.key)
            self.world.memory.delete(call.key)
        else:
            with suppress(ObjectExists):
                self.world.apply(writer, call)

    @precondition(lambda self: self.world.memory.objects)
    @rule(data=st.data(), content=st.sampled_from([b"", b"{}", None]))
    def an_object_is_corrupted_or_lost(self, data: st.DataObject, content: bytes | None) -> None:
        keys = sorted(self.world.memory.objects)
        newest = [key for key in keys if key.startswith(tuple(k.removesuffix("manifest.json") for k in self.head()))]
        key = data.draw(st.sampled_from(newest or keys) | st.sampled_from(keys))
        self.world.corrupted.add(key)
        if content is not None:
            self.world.memory.objects[key] = content
        elif key.endswith(".distcp"):
            del self.world.memory.objects[key]

    @invariant()
    def the_line_is_one_history(self) -> None:
        self.world.check_history()

    def teardown(self) -> None:
        try:
            self.every_process_is_killed_and_a_restart_resumes()
        finally:
            for writer in self.alive:
                writer.advance("killed")

    def every_process_is_killed_and_a_restart_resumes(self) -> None:
        """Progress: once faults stop, generations come to the newest intact checkpoint and extend it."""
        for writer in self.alive:
            writer.advance("killed")
        last = self.a_restart()
        for _ in tuple(self.world.trained):
            if isinstance(last.ended, CheckpointCorrupt):
                last = self.a_restart()
        if isinstance(last.ended, AllCheckpointsCorrupt):
            return
        assert last.ended is None, last.ended
        kept = checkpoint_chain(self.world.listing())
        newest = [manifest_key(last.generation, self.parent_step(last) + steps) for steps in (9, 6)]
        assert kept[:2] == tuple(newest)
        choice = choose_parent(self.world.listing(), ())
        assert choice.parent == kept[0]

    def a_restart(self) -> Writer:
        number = 1 + max(self.world.records, default=0)
        return self.run_to_the_end(self.writer(number, first=True, saves=3))

    @staticmethod
    def parent_step(writer: Writer) -> int:
        place = parse_manifest_key(writer.parent) if writer.parent else None
        return place[1] if place else 0

    @property
    def alive(self) -> list[Writer]:
        return [writer for writer in self.writers if writer.pending is not None]

    def head(self) -> tuple[str, ...]:
        return checkpoint_chain(self.world.listing())[:3]

    def writer(
        self, number: int, *, job_uid: str = "job", first: bool, saves: int, diverges: frozenset[int] = frozenset()
    ) -> Writer:
        nonce = str(next(self.nonces))
        self.writers.append(
            Writer(self.world, number, job_uid, first=first, nonce=nonce, saves=saves, diverges=diverges)
        )
        return self.writers[-1]

    @staticmethod
    def run_to_the_end(writer: Writer) -> Writer:
        for _ in range(ENOUGH_CALLS):
            if writer.pending is None:
                return writer
            writer.advance("done")
        raise AssertionError("it never ends")


TestHistory = pytest.mark.timeout(900)(History.TestCase)  # a failure is made small first, which takes minutes
TestHistory.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
