"""`pretrain checkpoints`: the history in a store as a table, and whether its bytes are those that were saved."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain_api.base import Frozen
from pretrain_api.checkpoint.lineage import IDENTITY_KEY, Manifest, Rollback, checkpoint_folder, parse_manifest_key
from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import Retain
from pretrain_cli.errors import BadInput
from pretrain_cli.targets.checkpoint_store import open_named
from pretrain_store.checkpoint_state import CheckpointState, checkpoint_states
from pretrain_store.errors import (
    CheckpointCorrupt,
    CredentialsRejected,
    NoSuchBucket,
    ObjectNotFound,
    StoreError,
    StoreRefused,
)
from pretrain_store.history import read_listing, read_manifest, verify
from pretrain_store.port import FEW_RETRIES, FULL_RETRIES, Readable

DONE, FAILED, BAD_INPUT = 0, 1, 2
_READERS = 16
_COLORS = {
    CheckpointState.IN_FORCE: "green",
    CheckpointState.REJECTED: "red",
    CheckpointState.GIVEN_UP: "yellow",
    CheckpointState.ASIDE: "yellow",
}


class Listed(Frozen):
    """A checkpoint of the store. What its manifest says is null where that cannot be read."""

    key: str
    step: int
    generation: int
    standing: CheckpointState
    pinned: bool | None
    """By `checkpoint.retain.pin` of the job; null where no job was named."""
    tokens: int | None = None
    workers: int | None = None
    bytes: int | None = None
    saved_at: str | None = None
    damage: str | None = None
    """What is wrong with it; without `--verify` only the manifest was looked at."""


class History(Frozen):
    """What a store holds, as `--json` prints it. Checkpoints and rollbacks are in the order of their making."""

    store: str
    generation: int
    """The highest number that a lineage record owns."""
    verified: bool
    checkpoints: tuple[Listed, ...]
    rollbacks: tuple[Rollback, ...]


@dataclass(frozen=True)
class View:
    """How the history is shown."""

    json: bool
    verify: bool


def checkpoints(name: str, view: View) -> int:
    """Show the history that `name` leads to; returns the exit code. What was wrong is printed."""
    try:
        store, retain = open_named(name, os.environ, FULL_RETRIES if view.verify else FEW_RETRIES)
        history = read(store, retain, _verified if view.verify else None)
    except (NoSuchBucket, CredentialsRejected) as problem:
        print(f"{problem}: correct the name, the credentials, or the endpoint in AWS_ENDPOINT_URL", file=sys.stderr)
        return BAD_INPUT
    except (InvalidJob, BadInput, StoreRefused) as problem:
        print(problem, file=sys.stderr)
        return BAD_INPUT
    except StoreError as problem:
        print(f"{problem}: the history cannot be read", file=sys.stderr)
        return FAILED
    if view.json:
        print(history.to_json())
    else:
        _show(history, Console())
    if not history.checkpoints:
        print(f"{history.store} has no checkpoint yet: generation {history.generation} is the newest", file=sys.stderr)
        return FAILED
    damaged = [item for item in history.checkpoints if item.damage and item.standing != CheckpointState.REJECTED]
    return FAILED if damaged else DONE


def read(store: Readable, retain: Retain | None, check: Callable[[Readable, Manifest], str | None] | None) -> History:
    """The history in a store. Raises BadInput when there is none, and StoreError.

    `check` says what is wrong with a checkpoint's objects; None: they are not looked at.
    """
    listing = read_listing(store)
    if not listing.highest and not listing.manifests and not _claimed(store):
        raise BadInput(f"{store.describe()} holds no run: name what a run's checkpoint.storage names")
    found = checkpoint_states(listing)
    keys = sorted(found, key=_place)
    with ThreadPoolExecutor(max_workers=_READERS) as threads:
        manifests = list(threads.map(lambda key: _manifest(store, key), keys))
    inspect = partial(check, store) if check is not None else None
    newest = listing.records.get(max(listing.records, default=0))
    return History(
        store=store.describe(),
        generation=listing.highest,
        verified=check is not None,
        checkpoints=tuple(
            _listed(key, manifest, found[key], retain, inspect) for key, manifest in zip(keys, manifests, strict=True)
        ),
        rollbacks=newest.rollbacks if newest is not None else (),
    )


def _claimed(store: Readable) -> bool:
    try:
        store.get(IDENTITY_KEY)
    except ObjectNotFound:
        return False
    return True


def _manifest(store: Readable, key: str) -> Manifest | str:
    """What is under the key, or what is wrong with it."""
    try:
        return read_manifest(store, key)
    except CheckpointCorrupt as corrupt:
        return corrupt.why


def _listed(
    key: str,
    manifest: Manifest | str,
    standing: CheckpointState,
    retain: Retain | None,
    check: Callable[[Manifest], str | None] | None,
) -> Listed:
    generation, step = _place(key)
    pinned = None if retain is None else step in retain.pin
    listed = Listed(key=key, step=step, generation=generation, standing=standing, pinned=pinned)
    if isinstance(manifest, str):
        return listed.model_copy(update={"damage": manifest})
    return listed.model_copy(
        update={
            "tokens": manifest.tokens,
            "workers": manifest.world_size,
            "bytes": manifest.bytes,
            "saved_at": manifest.created_at or None,
            "damage": check(manifest) if check else None,
        }
    )


def _verified(store: Readable, manifest: Manifest) -> str | None:
    """Fetch every object of a checkpoint, one at a time, and compare its digest; what is wrong, if anything."""
    folder = checkpoint_folder(manifest.generation, manifest.step)
    for item in manifest.objects:
        one = manifest.model_copy(update={"objects": (item,)})
        with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as temporary:
            try:
                store.fetch(f"{folder}/{item.key}", Path(temporary) / item.key)
                verify(one, Path(temporary))
            except ObjectNotFound:
                return f"{item.key} is missing"
            except CheckpointCorrupt as corrupt:
                return corrupt.why
    return None


def _show(history: History, console: Console) -> None:
    if not history.checkpoints:
        return

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"{history.store}, generation {history.generation}")
    console.print(table(history))
    for line in _footnotes(history):
        say(line)


def table(history: History) -> Table:
    """A row for each checkpoint, the newest first."""
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for name in ("step", "generation", "workers", "tokens", "MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ("saved", "standing", *(("bytes",) if history.verified else ())):
        result.add_column(name, no_wrap=name == "saved")
    for item in reversed(history.checkpoints):
        unread = item.damage if item.bytes is None else None
        standing = ", ".join(_worded(item, unread))
        result.add_row(
            f"{item.step:,}", str(item.generation), _number(item.workers), _number(item.tokens),
            "–" if item.bytes is None else f"{item.bytes / 1e6:,.1f}", _time(item.saved_at), standing,
            *((item.damage or "verified",) if history.verified else ()), style=_COLORS.get(item.standing),
        )  # fmt: skip
    return result


def _worded(item: Listed, unread: str | None) -> Iterator[str]:
    yield item.standing
    if item.pinned:
        yield "pinned"
    if unread is not None:
        yield unread


def _footnotes(history: History) -> Iterable[str]:
    if not any(item.standing == CheckpointState.IN_FORCE for item in history.checkpoints):
        yield "no checkpoint can be gone on from"
    for rollback in history.rollbacks:
        skipped = rollback.skipped
        passed = f", the data of steps {skipped.first:,} to {skipped.last:,} passed over" if skipped else ""
        yield (
            f"generation {rollback.generation} went back to step {rollback.to_step:,}: {rollback.cause} at step "
            f"{rollback.step:,}, begun at {rollback.since:,}{passed}"
        )


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _time(stamp: str | None) -> str:
    """In this machine's zone."""
    if stamp is None:
        return "–"
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return stamp


def _place(key: str) -> tuple[int, int]:
    place = parse_manifest_key(key)
    assert place is not None  # a listing has manifests' keys only
    return place
