"""Is the data there, whole, and made with this tokeniser? Found out before anything is started."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from tokenizers import Tokenizer

from pretrain_api.dataset import DATASET_FILE, Dataset, Shard
from pretrain_api.problems import Problem
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.training import Source
from pretrain_store.errors import ObjectNotFound, StoreError
from pretrain_store.open import S3Service, is_remote, split_uri

HASH_LIMIT = 512 * 1024**2
"""Bytes of shards up to which all are hashed, about a second; of more only the sizes are compared."""
_BLOCK = 1 << 20
_ITEM_BYTES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class TokenizerFile:
    """What matters of a tokenizer.json."""

    vocabulary: int
    """One more than the highest token."""
    digest: str
    content: bytes


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read a tokenizer.json. Raises OSError when that fails and ValueError when it is something else."""
    return _parse_tokenizer(path.read_bytes(), str(path))


def _parse_tokenizer(content: bytes, where: str) -> TokenizerFile:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{where} is no tokenizer.json of Hugging Face's tokenizers ({error})") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return TokenizerFile(highest + 1, hashlib.sha256(content).hexdigest(), content)


def check_tokenizer(uri: str, field: str, service: S3Service) -> TokenizerFile | Problem:
    """The tokeniser of a resolved job, or what is wrong with it."""
    try:
        if not is_remote(uri):
            return read_tokenizer(Path(uri))
        content = _from_s3(uri, field, service)
        return content if isinstance(content, Problem) else _parse_tokenizer(content, uri)
    except OSError as error:
        return Problem(field, f"{uri} cannot be read ({error.strerror}): correct the path, or make the tokeniser first")
    except ValueError as error:
        return Problem(field, f"{error}: name another file")


def read_dataset(source: Source, field: str, service: S3Service) -> Dataset | Problem:
    """A resolved source's description, or what is wrong with it."""
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
        said = f"{file} is no dataset description ({where}: {first['msg']}): make the data anew"
        return Problem(f"{field}.uri", said)


def _from_folder(folder: Path, field: str) -> bytes | Problem:
    if not folder.is_dir():
        return Problem(field, f"there is no folder {folder}: correct the path, or make the data first")
    try:
        return (folder / DATASET_FILE).read_bytes()
    except OSError as error:
        said = f"{folder / DATASET_FILE} cannot be read ({error.strerror}): name a folder of tokenised data"
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
    """What keeps a source from being trained on by this model with this tokeniser; None: the tokeniser is no good."""
    if tokenizer is not None and dataset.tokenizer_digest != tokenizer.digest:
        said = "was made with another tokeniser than spec.training.data.tokenizer: name that one, or make the data anew"
        yield Problem(f"{field}.uri", f"{uri} {said}")
    if dataset.vocabulary > 1 << 8 * _ITEM_BYTES[dataset.dtype]:
        said = f"{dataset.dtype} cannot hold its vocabulary of {dataset.vocabulary} tokens: make the data anew"
        yield Problem(f"{field}.uri", f"{uri}: {said}")
    if dataset.tokens == 0:
        yield Problem(f"{field}.uri", f"{uri} is empty: give it data, or leave the source out")
        return
    longest = max(shard.tokens for shard in dataset.shards)
    if longest < model.context + 1:
        yield Problem(
            "spec.training.model.context",
            f"context {model.context} needs shards of {model.context + 1} tokens, and the longest of {uri} has "
            f"{longest}: lower the context, or give {field} more data",
        )


def check_vocabulary(tokenizer: TokenizerFile, model: ResolvedModel) -> Iterator[Problem]:
    """The embedding must have a row for every token."""
    if model.vocabulary is not None and model.vocabulary < tokenizer.vocabulary:
        yield Problem(
            "spec.training.model.vocabulary",
            f"{model.vocabulary} is smaller than the tokeniser's vocabulary of {tokenizer.vocabulary}: "
            "raise it, or leave it out",
        )


def check_remote_shards(field: str, uri: str, dataset: Dataset, service: S3Service) -> Iterator[Problem]:
    """Sizes of all shards of a source in S3; whoever fetches one checks its digest."""
    try:
        sizes = {item.key: item.size for item in service.folder(uri).list("")}
    except StoreError as error:
        yield Problem(f"{field}.uri", f"{uri} cannot be listed ({error}): allow it")
        return
    for shard in dataset.shards:
        name, wanted = f"{uri.rstrip('/')}/{shard.name}", shard.tokens * _ITEM_BYTES[dataset.dtype]
        if shard.name not in sizes:
            yield Problem(f"{field}.uri", f"there is no shard {name}: upload it")
        elif sizes[shard.name] != wanted:
            said = f"shard {name} has {sizes[shard.name]} bytes, and {wanted} are wanted: upload it again"
            yield Problem(f"{field}.uri", said)


def check_shards(sources: Sequence[tuple[str, str, Dataset]], hash_limit: int = HASH_LIMIT) -> Iterator[Problem]:
    """Sizes of all shards of (field, folder, dataset), and digests when there are at most `hash_limit` bytes."""
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
        return f"shard {path} cannot be read ({error.strerror}): copy it again, or make the data anew"
    if size == wanted:
        return None
    word = "truncated" if size < wanted else "too long"
    return f"shard {path} is {word} ({size} bytes, {wanted} wanted): copy it again, or make the data anew"


def _wrong_digest(path: Path, shard: Shard) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return f"shard {path} cannot be read ({error.strerror}): copy it again, or make the data anew"
    if digest.hexdigest() == shard.sha256:
        return None
    return f"shard {path} is not what {DATASET_FILE} describes (another sha256): copy it again, or make the data anew"
