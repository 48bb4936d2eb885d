"""Checks of a job's starting point (`training.from`), before anything of the job is written. Reads only.

All functions raise InvalidOrigin, with a sentence that names the field and the remedy, and StoreError.
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
from pretrain_api.spec.architecture import from_hugging_face, incompatibility
from pretrain_api.spec.job import Storage
from pretrain_api.spec.training import From
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import CheckpointCorrupt, InvalidOrigin, ObjectNotFound
from pretrain_store.history import read_listing, read_manifest
from pretrain_store.lineage import intact_chain
from pretrain_store.open import S3Service, is_remote
from pretrain_store.port import FULL_RETRIES, Readable, RetryLimits

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_NAMED = 20


def open_origin(
    start: From, storage: Storage, environ: Mapping[str, str], limits: RetryLimits = FULL_RETRIES
) -> Readable:
    """Open the place that `start` names; in S3, with the endpoint and credentials of the job's own storage."""
    if is_remote(start.uri):
        return S3Service(storage, environ, limits).folder(start.uri)
    return DirectoryStore(Path(start.uri))


def recorded(store: Readable, start: From) -> Origin | None:
    """Return the recorded origin of the history in the job's own store; None: the history is empty.

    Raises InvalidOrigin when the history began from something else than `start`.
    """
    field = start.field
    try:
        origin = Origin.from_json(store.get(ORIGIN_KEY))
    except ObjectNotFound:
        if not read_listing(store).manifests:
            return None
        raise InvalidOrigin(
            f"{field}: {store.describe()} holds checkpoints that did not begin from {start.uri}: leave training.from "
            "out to resume from them, or choose another path or prefix in checkpoint.storage"
        ) from None
    except ValidationError as error:
        raise InvalidOrigin(f"{field}: {store.describe()}: {ORIGIN_KEY} there cannot be read: restore it") from error
    wanted = (start.uri.rstrip("/"), start.optimizer, start.step if start.step is not None else origin.step)
    if (origin.uri.rstrip("/"), origin.optimizer, origin.step) != wanted:
        raise InvalidOrigin(
            f"{field}: the checkpoints in {store.describe()} began from {origin}: name that again, leave "
            "training.from out to resume from them, or choose another path or prefix in checkpoint.storage"
        )
    return origin


def choose_checkpoint(
    there: Readable, start: From, wanted: JobIdentity, pinned: Origin | None = None
) -> tuple[Manifest, Origin]:
    """Choose the checkpoint of another run that the job `wanted` starts from, and make the record of the choice.

    `pinned`: the choice of an earlier start without a checkpoint of its own; it is kept while it exists.
    """
    field = start.field
    identity = _identity(there, start)
    if identity.version != wanted.version:
        raise InvalidOrigin(
            f"{field}: {start.uri} was written by a trainer with another layout of weights (version "
            f"{identity.version}, here {wanted.version}): export it with that trainer, and start from the export"
        )
    if identity.tokenizer_digest != wanted.tokenizer_digest:
        raise InvalidOrigin(
            f"{field}: {start.uri} was trained with another tokeniser than training.data.tokenizer: use "
            "that tokeniser, and data made with it"
        )
    if identity.model_digest != wanted.model_digest and (said := incompatibility(identity.model, wanted.model)):
        raise InvalidOrigin(f"{field}: {said}, in {start.uri}: change it, or start from something else")
    keys = intact_chain(read_listing(there))
    key = _key(keys, start, pinned)
    try:
        manifest = read_manifest(there, key)
    except CheckpointCorrupt as damage:
        raise InvalidOrigin(f"{field}: {start.uri} is damaged ({damage}): name another step") from damage
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    return manifest, Origin(uri=start.uri, checkpoint=key, step=manifest.step, optimizer=start.optimizer, sha256=digest)


def weight_files(there: Readable, start: From, wanted: JobIdentity, tokenizer: bytes) -> tuple[str, ...]:
    """Return the weight files of a Hugging Face folder, once its model and tokeniser are found to match."""
    field = start.field
    try:
        found = from_hugging_face(there.get(CONFIG))
    except ObjectNotFound:
        raise InvalidOrigin(
            f"{field}: {start.uri} has no {CONFIG}: name a folder in the format of Hugging Face"
        ) from None
    except ValueError as error:
        raise InvalidOrigin(f"{field}: {start.uri}: {error}: start from something else") from error
    if said := incompatibility(found, wanted.model):
        raise InvalidOrigin(f"{field}: {said}, in {start.uri}: change it, or start from something else")
    _refuse_other_tokenizer(there, start, tokenizer)
    try:
        index = json.loads(there.get(INDEX))
        return tuple(sorted(set(cast("dict[str, str]", index["weight_map"]).values())))
    except ObjectNotFound:
        pass
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidOrigin(f"{field}: {start.uri}/{INDEX} cannot be read ({error}): restore it") from error
    if not any(item.key == WEIGHTS for item in there.list(WEIGHTS)):
        raise InvalidOrigin(
            f"{field}: {start.uri} has no {WEIGHTS}: save the model as safetensors; pickles are not loaded"
        )
    return (WEIGHTS,)


def provenance(there: Readable) -> Provenance | None:
    """Read the provenance, with digests, that `pretrain export` writes beside the weights; None if there is none."""
    try:
        return Provenance.from_json(there.get(PROVENANCE_FILE))
    except (ObjectNotFound, ValidationError):
        return None


def _identity(there: Readable, start: From) -> JobIdentity:
    try:
        return JobIdentity.from_json(there.get(IDENTITY_KEY))
    except ObjectNotFound:
        raise InvalidOrigin(
            f"{start.field}: {start.uri} holds no run: name what another run's checkpoint.storage names"
        ) from None
    except ValidationError as error:
        raise InvalidOrigin(f"{start.field}: {start.uri}/{IDENTITY_KEY} cannot be read: restore it") from error


def _key(keys: tuple[str, ...], start: From, pinned: Origin | None) -> str:
    if not keys:
        raise InvalidOrigin(f"{start.field}: {start.uri} holds no checkpoint yet: wait for its first one")
    if pinned is not None and pinned.checkpoint in keys:
        return pinned.checkpoint
    if start.step is None:
        return keys[0]
    steps = {_step(key): key for key in reversed(keys)}
    if start.step not in steps:
        few = sorted(steps)[-_MOST_NAMED:]
        raise InvalidOrigin(
            f"training.from.step: {start.uri} has no checkpoint of step {start.step}; it has {', '.join(map(str, few))}"
        )
    return steps[start.step]


def _step(key: str) -> int:
    place = parse_manifest_key(key)
    assert place is not None  # a listing has manifests' keys only
    return place[1]


def _refuse_other_tokenizer(there: Readable, start: From, own: bytes) -> None:
    """Raise InvalidOrigin if the folder has a tokeniser that numbers tokens differently."""
    try:
        content = there.get(TOKENIZER)
    except ObjectNotFound:
        return
    if content != own and _tokens(content) != _tokens(own):
        raise InvalidOrigin(
            f"{start.field}: {start.uri} has another tokeniser than training.data.tokenizer: use that one, and data "
            "made with it"
        )


def _tokens(tokenizer: bytes) -> Any:
    """Return the parts of a tokenizer.json that number tokens; None if it cannot be read."""
    try:
        parsed = json.loads(tokenizer)
        added = {token["content"]: token["id"] for token in parsed.get("added_tokens") or ()}
        return parsed["model"].get("vocab"), parsed["model"].get("merges"), added
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
