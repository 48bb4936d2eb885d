"""Verification of tokenisers and datasets before a run: existence, integrity and fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from tokenizers import Tokenizer

from pretrain_api.dataset import DATASET_FILE, Dataset, Shard
from pretrain_api.problems import Problem
from pretrain_api.spec.data import Source
from pretrain_api.spec.model import ResolvedModel
from pretrain_store.errors import ObjectNotFound, StoreError
from pretrain_store.open import S3Service, is_remote, split_uri

HASH_LIMIT = 512 * 1024**2
"""Maximum total bytes of shards to hash, about a second; beyond it only sizes are compared."""
_BLOCK = 1 << 20
_ITEM_BYTES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class TokenizerFile:
    """Vocabulary, digest and content of a tokenizer.json."""

    vocabulary: int
    """Highest token plus one."""
    digest: str
    content: bytes


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read a tokenizer.json. Raises OSError if it is unreadable and ValueError if it is invalid."""
    return _parse_tokenizer(path.read_bytes(), str(path))


def _parse_tokenizer(content: bytes, where: str) -> TokenizerFile:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{where} is not a tokenizer.json of Hugging Face tokenizers ({error})") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return TokenizerFile(highest + 1, hashlib.sha256(content).hexdigest(), content)


def check_tokenizer(uri: str, field: str, service: S3Service) -> TokenizerFile | Problem:
    """Read the tokeniser of a resolved job, or describe its problem."""
    try:
        if not is_remote(uri):
            return read_tokenizer(Path(uri))
        content = _from_s3(uri, field, service)
        return content if isinstance(content, Problem) else _parse_tokenizer(content, uri)
    except OSError as error:
        return Problem(
            field, f"{uri} cannot be read ({error.strerror}): correct the path, or train the tokeniser first"
        )
    except ValueError as error:
        return Problem(field, f"{error}: give another file")


def read_dataset(source: Source, field: str, service: S3Service) -> Dataset | Problem:
    """Read the description of a resolved source, or describe its problem."""
    file = f"{source.uri.rstrip('/')}/{DATASET_FILE}"
    remote = is_remote(source.uri)
    content = _from_s3(file, f"{field}.uri", service) if remote else _from_folder(Path(source.uri), f"{field}.uri")
    if isinstance(content, Problem):
        return content
    try:
        return Dataset.from_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        said = f"{file} is not a dataset description ({where}: {first['msg']}): build the dataset again"
        return Problem(f"{field}.uri", said)


def _from_folder(folder: Path, field: str) -> bytes | Problem:
    if not folder.is_dir():
        return Problem(field, f"there is no folder {folder}: correct the path, or build the dataset first")
    try:
        return (folder / DATASET_FILE).read_bytes()
    except OSError as error:
        said = f"{folder / DATASET_FILE} cannot be read ({error.strerror}): give the folder of a tokenised dataset"
        return Problem(field, said)


def _from_s3(uri: str, field: str, service: S3Service) -> bytes | Problem:
    folder, name = split_uri(uri)
    try:
        return service.folder(folder).get(name)
    except ObjectNotFound:
        return Problem(field, f"there is no {uri}: correct the URI, or upload it first")
    except StoreError as error:
        return Problem(field, f"{uri} cannot be read ({error}): correct the URI, the credentials or the endpoint")


def check_fit(
    dataset: Dataset, uri: str, field: str, tokenizer: TokenizerFile | None, model: ResolvedModel
) -> Iterator[Problem]:
    """Check that a model can be trained on a source; `tokenizer` is None if it is invalid."""
    if tokenizer is not None and dataset.tokenizer_digest != tokenizer.digest:
        said = (
            "was built with another tokeniser than spec.training.data.tokenizer: give that one, or build the dataset "
            "again"
        )
        yield Problem(f"{field}.uri", f"{uri} {said}")
    if dataset.vocabulary > 1 << 8 * _ITEM_BYTES[dataset.dtype]:
        said = f"{dataset.dtype} cannot hold its vocabulary of {dataset.vocabulary} tokens: build the dataset again"
        yield Problem(f"{field}.uri", f"{uri}: {said}")
    if dataset.tokens == 0:
        yield Problem(f"{field}.uri", f"{uri} is empty: add data, or remove the source")
        return
    longest = max(shard.tokens for shard in dataset.shards)
    if longest < model.context + 1:
        yield Problem(
            "spec.training.model.context",
            f"context {model.context} needs shards of {model.context + 1} tokens, but the longest of {uri} has "
            f"{longest}: lower the context, or add data to {field}",
        )


def check_vocabulary(tokenizer: TokenizerFile, model: ResolvedModel) -> Iterator[Problem]:
    """Check that the embedding has a row for every token."""
    if model.vocabulary is not None and model.vocabulary < tokenizer.vocabulary:
        yield Problem(
            "spec.training.model.vocabulary",
            f"{model.vocabulary} is smaller than the tokeniser's vocabulary of {tokenizer.vocabulary}: "
            "raise it, or omit it",
        )


def check_remote_shards(field: str, uri: str, dataset: Dataset, service: S3Service) -> Iterator[Problem]:
    """Check the sizes of all shards of a source in S3; digests are verified when shards are fetched."""
    try:
        sizes = {item.key: item.size for item in service.folder(uri).list("")}
    except StoreError as error:
        yield Problem(f"{field}.uri", f"{uri} cannot be listed ({error}): grant permission to list it")
        return
    for shard in dataset.shards:
        name, wanted = f"{uri.rstrip('/')}/{shard.name}", shard.tokens * _ITEM_BYTES[dataset.dtype]
        if shard.name not in sizes:
            yield Problem(f"{field}.uri", f"there is no shard {name}: upload it")
        elif sizes[shard.name] != wanted:
            said = f"shard {name} has {sizes[shard.name]} bytes, expected {wanted}: upload it again"
            yield Problem(f"{field}.uri", said)


def check_shards(sources: Sequence[tuple[str, str, Dataset]], hash_limit: int = HASH_LIMIT) -> Iterator[Problem]:
    """Check the sizes of all shards of (field, folder, dataset), and digests up to `hash_limit` bytes."""
    total = sum(dataset.tokens * _ITEM_BYTES[dataset.dtype] for _, _, dataset in sources)
    for field, folder, dataset in sources:
        for shard in dataset.shards:
            path = Path(folder) / shard.name
            said = _wrong_size(path, shard.tokens * _ITEM_BYTES[dataset.dtype])
            if said is None and total <= hash_limit:
                said = _wrong_digest(path, shard)
            if said is not None:
                yield Problem(f"{field}.uri", said)


def _wrong_size(path: Path, wanted: int) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"shard {path} cannot be read ({error.strerror}): copy it again, or build the dataset again"
    if size == wanted:
        return None
    word = "truncated" if size < wanted else "too long"
    return f"shard {path} is {word} ({size} bytes, expected {wanted}): copy it again, or build the dataset again"


def _wrong_digest(path: Path, shard: Shard) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return f"shard {path} cannot be read ({error.strerror}): copy it again, or build the dataset again"
    if digest.hexdigest() == shard.sha256:
        return None
    return f"shard {path} does not match {DATASET_FILE} (different sha256): copy it again, or build the dataset again"
