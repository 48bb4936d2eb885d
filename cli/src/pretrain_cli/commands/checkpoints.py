"""`pretrain checkpoints`: list a store's checkpoint history and verify its bytes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain_api.base import Frozen
from pretrain_api.checkpoint.lineage import IDENTITY_KEY, Manifest, Rollback, checkpoint_folder, parse_manifest_key
from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import Retain
from pretrain_cli.errors import BadInput, CliExit
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

_READERS = 16
_COLORS = {
    CheckpointState.CURRENT: "green",
    CheckpointState.REJECTED: "red",
    CheckpointState.GIVEN_UP: "yellow",
    CheckpointState.NOT_IN_LINEAGE: "yellow",
}


class CheckpointEntry(Frozen):
    """Checkpoint of a store. Fields of the manifest are null if it is unreadable."""

    key: str
    step: int
    generation: int
    standing: CheckpointState
    pinned: bool | None
    """True if pinned by `checkpoint.retain.pin` of the job; null without a job."""
    tokens: int | None = None
    workers: int | None = None
    bytes: int | None = None
    saved_at: str | None = None
    damage: str | None = None
    """Damage found; without `--verify` only the manifest is checked."""


class CheckpointHistory(Frozen):
    """History in a store, as printed by `--json`. Checkpoints and rollbacks are in chronological order."""

    store: str
    generation: int
    """Highest number of a lineage record."""
    verified: bool
    checkpoints: tuple[CheckpointEntry, ...]
    rollbacks: tuple[Rollback, ...]


def checkpoints(name: str, *, as_json: bool, verified: bool) -> int:
    """Print the checkpoint history of a run or store, or the mistake; return the exit code."""
    try:
        store, retain = open_named(name, os.environ, FULL_RETRIES if verified else FEW_RETRIES)
        history = read_history(store, retain, _damage if verified else None)
    except (NoSuchBucket, CredentialsRejected) as problem:
        print(f"{problem}: correct the name, the credentials, or the endpoint in AWS_ENDPOINT_URL", file=sys.stderr)
        return CliExit.BAD_INPUT
    except (InvalidJob, BadInput, StoreRefused) as problem:
        print(problem, file=sys.stderr)
        return CliExit.BAD_INPUT
    except StoreError as problem:
        print(f"{problem}: cannot read the history", file=sys.stderr)
        return CliExit.FAILED
    if as_json:
        print(history.to_json())
    else:
        _show(history, Console())
    if not history.checkpoints:
        print(f"{history.store} has no checkpoint yet; latest generation: {history.generation}", file=sys.stderr)
        return CliExit.FAILED
    damaged = [item for item in history.checkpoints if item.damage and item.standing != CheckpointState.REJECTED]
    return CliExit.FAILED if damaged else CliExit.DONE


def read_history(
    store: Readable, retain: Retain | None, check: Callable[[Readable, Manifest], str | None] | None
) -> CheckpointHistory:
    """Read the history in a store. Raises BadInput if there is none, and StoreError.

    `check` returns the damage of a checkpoint's objects; None: objects are not checked.
    """
    listing = read_listing(store)
    if not listing.highest and not listing.manifests and not _claimed(store):
        raise BadInput(f"{store.describe()} holds no run: give the checkpoint.storage of a run")
    found = checkpoint_states(listing)
    keys = sorted(found, key=_place)
    with ThreadPoolExecutor(max_workers=_READERS) as threads:
        manifests = list(threads.map(lambda key: _manifest(store, key), keys))
    inspect = partial(check, store) if check is not None else None
    newest = listing.records.get(max(listing.records, default=0))
    return CheckpointHistory(
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
    """Read a manifest, or describe its damage."""
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
) -> CheckpointEntry:
    generation, step = _place(key)
    pinned = None if retain is None else step in retain.pin
    listed = CheckpointEntry(key=key, step=step, generation=generation, standing=standing, pinned=pinned)
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


def _damage(store: Readable, manifest: Manifest) -> str | None:
    """Fetch every object of a checkpoint, one at a time, and verify its digest; return the damage, if any."""
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


def _show(history: CheckpointHistory, console: Console) -> None:
    if not history.checkpoints:
        return

    def print_line(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    print_line(f"{history.store}, generation {history.generation}")
    console.print(table(history))
    for line in _footnotes(history):
        print_line(line)


def table(history: CheckpointHistory) -> Table:
    """Build a table with a row for each checkpoint, the latest first."""
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for name in ("step", "generation", "workers", "tokens", "MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ("saved", "standing", *(("bytes",) if history.verified else ())):
        result.add_column(name, no_wrap=name == "saved")
    for item in reversed(history.checkpoints):
        unread = item.damage if item.bytes is None else None
        standing = ", ".join(_standing_words(item, unread))
        result.add_row(
            f"{item.step:,}", str(item.generation), _number(item.workers), _number(item.tokens),
            "–" if item.bytes is None else f"{item.bytes / 1e6:,.1f}", _time(item.saved_at), standing,
            *((item.damage or "verified",) if history.verified else ()), style=_COLORS.get(item.standing),
        )  # fmt: skip
    return result


def _standing_words(item: CheckpointEntry, unread: str | None) -> Iterator[str]:
    yield item.standing
    if item.pinned:
        yield "pinned"
    if unread is not None:
        yield unread


def _footnotes(history: CheckpointHistory) -> Iterable[str]:
    if not any(item.standing == CheckpointState.CURRENT for item in history.checkpoints):
        yield "no checkpoint can be restored"
    for rollback in history.rollbacks:
        skipped = rollback.skipped
        gap = f"; skipped the data of steps {skipped.first:,} to {skipped.last:,}" if skipped else ""
        yield (
            f"generation {rollback.generation} rolled back to step {rollback.to_step:,}: {rollback.cause} at step "
            f"{rollback.step:,}, since step {rollback.since:,}{gap}"
        )


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _time(stamp: str | None) -> str:
    """Format a timestamp in the local time zone."""
    if stamp is None:
        return "–"
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return stamp


def _place(key: str) -> tuple[int, int]:
    place = parse_manifest_key(key)
    assert place is not None  # a listing has only keys of manifests
    return place
