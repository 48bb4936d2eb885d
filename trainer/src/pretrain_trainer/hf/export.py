"""`python -m pretrain_trainer.hf.export < REQUEST.json`: export a verified checkpoint in Hugging Face's format.

The run's storage is only read. The exported folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain_api.checkpoint.identity import model_digest, model_fields
from pretrain_api.checkpoint.lineage import (
    IDENTITY_KEY,
    IDENTITY_VERSION,
    JobIdentity,
    Manifest,
    StoredObject,
    checkpoint_folder,
    parse_manifest_key,
)
from pretrain_api.messages.export import (
    PROVENANCE_FILE,
    Advanced,
    CheckpointSkipped,
    Exported,
    ExportEvent,
    ExportRequest,
    Provenance,
    Staged,
)
from pretrain_api.spec.model import ResolvedModel, resolve
from pretrain_sdk.scratch import Scratch
from pretrain_store.errors import CheckpointCorrupt, HistoryError, ObjectNotFound, StoreError
from pretrain_store.history import read_listing, read_manifest, verify
from pretrain_store.lineage import intact_chain
from pretrain_store.open import S3Service, is_remote, open_store, split_uri
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import TensorLoader, UnusableFiles, read_metadata
from pretrain_trainer.checkpoint.dcp.state import tensors_of_model
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    InvalidInput,
    NoUsableCheckpointError,
    StorageUnavailable,
    TrainerError,
)
from pretrain_trainer.datasets.corpus import folder
from pretrain_trainer.hf.folder import ModelFolder, digests
from pretrain_trainer.models.decoder import Decoder, build
from pretrain_trainer.observability.failures import process_exit

INTERRUPTED = 130
_MOST_NAMED = 20
Say = Callable[[ExportEvent], None]


@dataclass(frozen=True)
class ExportSource:
    """Storage and identity of the run to export."""

    store: ObjectStore
    shape: ResolvedModel
    identity: JobIdentity
    environ: Mapping[str, str]


def main() -> None:
    """Export the checkpoint requested on standard input."""
    try:
        request = ExportRequest.from_json(sys.stdin.buffer.read())
        export(request, os.environ, lambda event: print(event.to_json(), flush=True))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ValidationError as error:
        print(f"the request is invalid: {error.errors()[0]['msg']}", file=sys.stderr)
        sys.exit(InvalidInput.exit_code)
    except OSError as error:
        print(f"--out cannot be written: {error}", file=sys.stderr)
        sys.exit(TrainerError.exit_code)
    except Exception as error:
        end = process_exit(error, 0)
        if not end.expected:
            traceback.print_exc()
        print(end.message, file=sys.stderr)
        sys.exit(end.exit_code)


def export(request: ExportRequest, environ: Mapping[str, str], say: Say) -> Exported:
    """Write the checkpoint to `request.out`.

    Raises InvalidInput, CheckpointRejectedError when the requested step is corrupt, NoUsableCheckpointError or
    StorageUnavailable; then the folder does not exist, or is empty.
    """
    training = request.config.training
    out = Path(request.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"--out {out} is not empty: name an empty folder, or one that does not exist")
    try:
        source = _open(request, environ)
        tokenizer = _tokenizer(request, environ, source.identity)
        model, manifest, key = _newest_intact(source, request.step, say)
    except (StoreError, HistoryError) as error:
        raise StorageUnavailable(f"the run's storage cannot be read: {error}") from error
    say(Staged(text=f"writing {out}"))
    temperature = training.sampling.temperature if training.sampling is not None else None
    content = ModelFolder(source.shape, model.state_dict(), tokenizer, request.dtype, temperature)
    with _appearing(out) as draft:
        content.write(draft)
        _write_card(draft, request, manifest)
        files = digests(draft)
        _write_provenance(draft, request, source, manifest, key, files)
    exported = Exported(
        step=manifest.step,
        tokens=manifest.tokens,
        checkpoint=key,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(file.size for file in files),
    )
    say(exported)
    return exported


def _open(request: ExportRequest, environ: Mapping[str, str]) -> ExportSource:
    store = open_store(request.config.checkpoint.storage, environ)
    try:
        identity = JobIdentity.from_json(store.get(IDENTITY_KEY))
    except ObjectNotFound:
        raise InvalidInput(
            f"{store.describe()} holds no run: correct checkpoint.storage, or train first; a run's folder is the one "
            "that `pretrain run --out` named"
        ) from None
    except ValidationError as error:
        raise InvalidInput(f"{store.describe()}: {IDENTITY_KEY} there cannot be read: restore it") from error
    if identity.version != IDENTITY_VERSION:
        raise InvalidInput(
            f"{store.describe()} was written by a trainer with another layout of weights (version {identity.version}, "
            f"here {IDENTITY_VERSION}): export it with that trainer"
        )
    shape = resolve(request.config.training.model)
    if shape.norm == "post":
        raise InvalidInput("training.model.norm: GPT2LMHeadModel has no place for post-norm, so it cannot be exported")
    return ExportSource(store, shape, identity, environ)


def _tokenizer(request: ExportRequest, environ: Mapping[str, str], identity: JobIdentity) -> bytes:
    """Read the tokeniser; raise InvalidInput if the run was trained with another one."""
    uri = request.config.training.data.tokenizer
    where, name = split_uri(uri)
    if is_remote(uri):
        content = S3Service(request.config.checkpoint.storage, environ).folder(where).get(name)
    else:
        content = folder(where, "training.data.tokenizer").read(name)
    if hashlib.sha256(content).hexdigest() != identity.tokenizer_digest:
        raise InvalidInput(
            f"training.data.tokenizer: {uri} is not the tokeniser that the run was trained with: restore that one"
        )
    return content


def _newest_intact(source: ExportSource, step: int | None, say: Say) -> tuple[Decoder, Manifest, str]:
    """Load the model of the requested step, or of the newest intact checkpoint of the lineage."""
    listing = read_listing(source.store)
    keys = intact_chain(listing)
    if not keys:
        raise InvalidInput(f"{source.store.describe()} holds no checkpoint yet: wait for the first one")
    if step is not None:
        keys = tuple(key for key in keys if _step(key) == step)
        if not keys:
            raise InvalidInput(f"--step {step}: there is no such checkpoint; there are {_steps(intact_chain(listing))}")
    found: list[str] = []
    for key in keys:
        try:
            manifest = read_manifest(source.store, key)
            return _load(source, manifest, say), manifest, key
        except (CheckpointCorrupt, ObjectNotFound, UnusableFiles) as damage:
            found.append(key)
            if step is not None:
                raise CheckpointRejectedError(key, str(damage)) from damage
            say(CheckpointSkipped(message=f"the checkpoint of step {_step(key)} is damaged ({damage})"))
    raise NoUsableCheckpointError(f"all {len(found)} checkpoints of {source.store.describe()} are damaged: restore one")


def _load(source: ExportSource, manifest: Manifest, say: Say) -> Decoder:
    """Load and verify the model of a checkpoint, without the optimizer's state."""
    prefix = checkpoint_folder(manifest.generation, manifest.step)
    sizes = {item.key: item.size for item in manifest.objects}
    say(Staged(text=f"fetching and verifying the checkpoint of step {manifest.step}"))
    with Scratch.with_room(manifest.bytes, source.environ) as scratch:

        def fetch(name: str) -> None:
            if name not in sizes:
                raise UnusableFiles(f"its manifest does not name {name}")
            source.store.fetch(f"{prefix}/{name}", scratch.path / name)
            only = tuple(item for item in manifest.objects if item.key == name)
            verify(manifest.model_copy(update={"objects": only}), scratch.path)

        fetch(METADATA)
        metadata = read_metadata((scratch.path / METADATA).read_bytes())
        saved = metadata.state_dict_metadata.get("model.token_embedding.weight")
        rows = int(saved.size[0]) if isinstance(saved, TensorStorageMetadata) else 0
        _refuse_other_model(source, rows)
        model = build(source.shape, rows, torch.device("cpu"))
        loading = TensorLoader(tensors_of_model(model), metadata)
        done, total = 0, sum(sizes[name] for name in loading.files if name in sizes)
        for name in loading.files:
            fetch(name)
            done += sizes[name]
            say(Advanced(done=done, total=total))
        loading.load(scratch.path)
    return model


def _refuse_other_model(source: ExportSource, rows: int) -> None:
    """Raise InvalidInput if the job file describes another model than was trained."""
    if model_digest(source.shape, rows) == source.identity.model_digest:
        return
    here, there = model_fields(source.shape, rows), source.identity.model
    differing = [name for name in here if name in there and here[name] != there[name]]
    said = ", ".join(f"{name} is {here[name]} here and {there[name]} there" for name in differing)
    raise InvalidInput(
        f"training.model is not that of the run in {source.store.describe()}{f' ({said})' if said else ''}: correct it"
    )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a draft folder beside `out` that replaces it on success, and is removed on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        draft.chmod(0o755)
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_card(draft: Path, request: ExportRequest, manifest: Manifest) -> None:
    training = request.config.training
    mix = "\n".join(f"- {source.name}, weight {source.weight:g}" for source in training.data.sources)
    (draft / "README.md").write_text(
        f"# {request.config.job_name}\n\nStep {manifest.step:,} of {training.total_steps:,}, after "
        f"{manifest.tokens:,} tokens of:\n\n{mix}\n\nExported by pretrain-operator; `{PROVENANCE_FILE}` names the "
        "checkpoint and the digest of each file.\n"
    )


def _write_provenance(
    draft: Path,
    request: ExportRequest,
    source: ExportSource,
    manifest: Manifest,
    key: str,
    files: tuple[StoredObject, ...],
) -> None:
    provenance = Provenance(
        job=request.config.job_name,
        checkpoint=key,
        step=manifest.step,
        tokens=manifest.tokens,
        tokenizer_digest=source.identity.tokenizer_digest,
        files=files,
    )
    (draft / PROVENANCE_FILE).write_text(provenance.model_dump_json(indent=1) + "\n")


def _step(key: str) -> int:
    place = parse_manifest_key(key)
    assert place is not None  # a listing has manifests' keys only
    return place[1]


def _steps(keys: tuple[str, ...]) -> str:
    steps = [str(_step(key)) for key in reversed(keys)]
    left_out = len(steps) - _MOST_NAMED
    return ", ".join(steps) if left_out <= 0 else f"{left_out} earlier ones, {', '.join(steps[left_out:])}"


if __name__ == "__main__":
    main()
