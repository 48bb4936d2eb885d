"""What a job starts from: found, and found to fit, before anything of the job is written. Reads only.

Everything here raises UnfitOrigin with a sentence that names the field and the remedy, and StoreError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from pretrain_api.checkpoint.lineage import IDENTITY_KEY, ORIGIN_KEY, JobIdentity, Manifest, Origin, parse_manifest_key
from pretrain_api.messages.export import PROVENANCE_FILE, Provenance
from pretrain_api.spec.architecture import from_hugging_face, unfit
from pretrain_api.spec.job import Storage
from pretrain_api.spec.training import From
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import Corrupt, Missing, UnfitOrigin
from pretrain_store.history import read_listing, read_manifest
from pretrain_store.lineage import intact
from pretrain_store.open import Service, is_remote
from pretrain_store.port import ENDURING, Patience, Readable

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_NAMED = 20


def open_origin(start: From, storage: Storage, environ: Mapping[str, str], patience: Patience = ENDURING) -> Readable:
    """The place that `start` names; in S3 by the service and the credentials of the job's own storage."""
    if is_remote(start.uri):
        return Service(storage, environ, patience).folder(start.uri)
    return DirectoryStore(Path(start.uri))


def recorded(store: Readable, start: From) -> Origin | None:
    """What the history in the job's own store began from; None: it has not begun.

    Raises UnfitOrigin when it began from something else than `start`.
    """
    field = start.field
    try:
        origin = Origin.from_json(store.get(ORIGIN_KEY))
    except Missing:
        if not read_listing(store).manifests:
            return None
        raise UnfitOrigin(
            f"{field}: {store.describe()} holds checkpoints that did not begin from {start.uri}: leave training.from "
            "out to go on with them, or choose another path or prefix in checkpoint.storage"
        ) from None
    except ValidationError as error:
        raise UnfitOrigin(f"{field}: {store.describe()}: {ORIGIN_KEY} there cannot be read: restore it") from error
    wanted = (start.uri.rstrip("/"), start.optimizer, start.step if start.step is not None else origin.step)
    if (origin.uri.rstrip("/"), origin.optimizer, origin.step) != wanted:
        raise UnfitOrigin(
            f"{field}: the checkpoints in {store.describe()} began from {origin}: name that again, leave "
            "training.from out to go on with them, or choose another path or prefix in checkpoint.storage"
        )
    return origin


def choose_checkpoint(
    there: Readable, start: From, wanted: JobIdentity, pinned: Origin | None = None
) -> tuple[Manifest, Origin]:
    """The checkpoint of another run that the job `wanted` is to start from, and the record of it.

    `pinned`: a start that came to no checkpoint had chosen this one; it is kept to while it is there.
    """
    field = start.field
    identity = _identity(there, start)
    if identity.version != wanted.version:
        raise UnfitOrigin(
            f"{field}: {start.uri} was written by a trainer that lays out weights otherwise (version "
            f"{identity.version}, here {wanted.version}): export it with that one, and start from the export"
        )
    if identity.tokenizer_digest != wanted.tokenizer_digest:
        raise UnfitOrigin(
            f"{field}: {start.uri} was trained with another tokeniser than training.data.tokenizer: use that one, and "
            "data made with it"
        )
    if identity.model_digest != wanted.model_digest and (said := unfit(identity.model, wanted.model)):
        raise UnfitOrigin(f"{field}: {said}, in {start.uri}: change it, or start from something else")
    keys = intact(read_listing(there))
    key = _key(keys, start, pinned)
    try:
        manifest = read_manifest(there, key)
    except Corrupt as damage:
        raise UnfitOrigin(f"{field}: {start.uri} is damaged ({damage}): name another step") from damage
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    return manifest, Origin(uri=start.uri, checkpoint=key, step=manifest.step, optimizer=start.optimizer, sha256=digest)


def weight_files(there: Readable, start: From, wanted: JobIdentity, tokenizer: bytes) -> tuple[str, ...]:
    """The files of a folder of Hugging Face that hold the weights, after its model and tokeniser were found to fit."""
    field = start.field
    try:
        found = from_hugging_face(there.get(CONFIG))
    except Missing:
        raise UnfitOrigin(
            f"{field}: {start.uri} has no {CONFIG}: name a folder in the format of Hugging Face"
        ) from None
    except ValueError as error:
        raise UnfitOrigin(f"{field}: {start.uri}: {error}: start from something else") from error
    if said := unfit(found, wanted.model):
        raise UnfitOrigin(f"{field}: {said}, in {start.uri}: change it, or start from something else")
    _refuse_other_tokenizer(there, start, tokenizer)
    try:
        index = json.loads(there.get(INDEX))
        return tuple(sorted(set(cast("dict[str, str]", index["weight_map"]).values())))
    except Missing:
        pass
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnfitOrigin(f"{field}: {start.uri}/{INDEX} cannot be read ({error}): restore it") from error
    if not any(item.key == WEIGHTS for item in there.list(WEIGHTS)):
        raise UnfitOrigin(
            f"{field}: {start.uri} has no {WEIGHTS}: save the model as safetensors; pickles are not loaded"
        )
    return (WEIGHTS,)


def provenance(there: Readable) -> Provenance | None:
    """What `pretrain export` wrote beside the weights, which has their digests; None where others made the folder."""
    try:
        return Provenance.from_json(there.get(PROVENANCE_FILE))
    except (Missing, ValidationError):
        return None


def _identity(there: Readable, start: From) -> JobIdentity:
    try:
        return JobIdentity.from_json(there.get(IDENTITY_KEY))
    except Missing:
        raise UnfitOrigin(
            f"{start.field}: {start.uri} holds no run: name what another run's checkpoint.storage names"
        ) from None
    except ValidationError as error:
        raise UnfitOrigin(f"{start.field}: {start.uri}/{IDENTITY_KEY} cannot be read: restore it") from error


def _key(keys: tuple[str, ...], start: From, pinned: Origin | None) -> str:
    if not keys:
        raise UnfitOrigin(f"{start.field}: {start.uri} holds no checkpoint yet: wait for its first one")
    if pinned is not None and pinned.checkpoint in keys:
        return pinned.checkpoint
    if start.step is None:
        return keys[0]
    steps = {_step(key): key for key in reversed(keys)}
    if start.step not in steps:
        few = sorted(steps)[-_MOST_NAMED:]
        raise UnfitOrigin(
            f"training.from.step: {start.uri} has no checkpoint of step {start.step}; it has {', '.join(map(str, few))}"
        )
    return steps[start.step]


def _step(key: str) -> int:
    place = parse_manifest_key(key)
    assert place is not None  # a listing has manifests' keys only
    return place[1]


def _refuse_other_tokenizer(there: Readable, start: From, own: bytes) -> None:
    """Where the folder has a tokeniser, each token must have the same number there and here."""
    try:
        content = there.get(TOKENIZER)
    except Missing:
        return
    if content != own and _tokens(content) != _tokens(own):
        raise UnfitOrigin(
            f"{start.field}: {start.uri} has another tokeniser than training.data.tokenizer: use that one, and data "
            "made with it"
        )


def _tokens(tokenizer: bytes) -> Any:
    """What of a tokenizer.json gives tokens their numbers."""
    try:
        parsed = json.loads(tokenizer)
        added = {token["content"]: token["id"] for token in parsed.get("added_tokens") or ()}
        return parsed["model"].get("vocab"), parsed["model"].get("merges"), added
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
