"""`training.from`: the first weights of a history from another run's checkpoint, or from a folder of Hugging Face.

It is looked at before anything is written, recorded once beside the lineage, and loaded after every digest was checked,
by starts that find no checkpoint of their own and by no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import ORIGIN_KEY, JobIdentity, Manifest, Origin, checkpoint_folder
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.job import Storage
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.training import From
from pretrain_sdk.scratch import Scratch
from pretrain_store.digest import digest_of
from pretrain_store.errors import HistoryError, InvalidOrigin, ObjectExists, ObjectNotFound, StoreError
from pretrain_store.history import read_listing, verify
from pretrain_store.open import open_store
from pretrain_store.origin import choose_checkpoint, open_origin, provenance, recorded, weight_files
from pretrain_store.port import ObjectStore, Readable
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import TensorLoader, UnusableFiles, read_metadata, scalar_names
from pretrain_trainer.checkpoint.dcp.state import (
    make_optimizer_state,
    optimizer_entries,
    tensors_of,
    tensors_of_model,
)
from pretrain_trainer.checkpoint.history.claim import timestamp
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import InvalidInput, ObstacleError
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.waits import obstacle_behind
from pretrain_trainer.hf.mapping import import_state
from pretrain_trainer.models.decoder import Decoder, skeleton
from pretrain_trainer.parallelism.parallelize import set_part

Result = TypeVar("Result")
_ENTRIES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass(frozen=True)
class _Chosen:
    """What the first rank found."""

    manifest: Manifest | None
    """Of another run; None: Hugging Face."""
    files: tuple[str, ...]
    origin: Origin | None
    """None until the files have been read."""


class Beginning:
    """Where the first weights of a run come from. Its methods are collective; they raise on all ranks alike."""

    def __init__(
        self, start: From, config: TrainerConfig, identity: JobIdentity, tokenizer: bytes, ranks: Ranks,
        environ: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._start = start
        self._config = config
        self._identity = identity
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._environ = environ
        self._collectives = Collectives(None)

    @classmethod
    def of(
        cls, config: TrainerConfig, identity: JobIdentity, tokenizer: bytes, ranks: Ranks, environ: Mapping[str, str]
    ) -> Self | None:
        """That of a job; None where the weights are drawn from the seed. Nothing is opened yet."""
        start = config.training.origin
        return cls(start, config, identity, tokenizer, ranks, environ) if start is not None else None

    @property
    def _storage(self) -> Storage:
        return self._config.checkpoint.storage

    def check(self) -> None:
        """Find out whether it can be begun from, or has been; writes nothing. Raises InvalidInput or an Obstacle."""
        self._first(lambda: None if self._has_begun() else self._choose())

    def load(self, model: Decoder, optimizer: Optimizer, shape: ResolvedModel) -> Origin:
        """Load the weights, and the optimizer's state where that is wanted, after recording where they come from.

        Raises InvalidInput when something there is damaged or of another model, and an Obstacle when it cannot be
        fetched now: then it may be called again.
        """
        chosen = self._first(self._choose)
        if chosen.manifest is not None:
            assert chosen.origin is not None  # of another run
            self._first(lambda: self._record(chosen.origin))
            self._load_checkpoint(chosen.manifest, model, optimizer)
            return chosen.origin
        return self._import(chosen.files, model, shape)

    def _has_begun(self) -> bool:
        own = open_store(self._storage, self._environ)
        return recorded(own, self._start) is not None and bool(read_listing(own).manifests)

    def _choose(self) -> _Chosen:
        own = open_store(self._storage, self._environ)
        pinned = recorded(own, self._start)
        there = self._there()
        if self._start.run is not None:
            manifest, origin = choose_checkpoint(there, self._start, self._identity, pinned)
            return _Chosen(manifest, (), pinned if pinned and pinned.sha256 == origin.sha256 else origin)
        return _Chosen(None, weight_files(there, self._start, self._identity, self._tokenizer), None)

    def _there(self) -> Readable:
        return open_origin(self._start, self._storage, self._environ)

    def _record(self, origin: Origin | None) -> None:
        """Put the record. Another start may have put its own before it came to a checkpoint: then the latest counts."""
        assert origin is not None  # by now
        store: ObjectStore = open_store(self._storage, self._environ)
        content = origin.model_copy(update={"created_at": origin.created_at or timestamp()}).to_json().encode()
        try:
            store.put(ORIGIN_KEY, content, if_absent=True)
        except ObjectExists:
            if recorded(store, self._start) != origin:
                store.put(ORIGIN_KEY, content)

    # --- another run's checkpoint ---------------------------------------------------------------------------------

    def _load_checkpoint(self, manifest: Manifest, model: nn.Module, optimizer: Optimizer) -> None:
        with ExitStack() as stack:

            def fetched() -> tuple[Path, TensorLoader]:
                scratch = stack.enter_context(Scratch.with_room(manifest.bytes, self._environ))
                return scratch.path, self._fetch(manifest, scratch.path, model, optimizer)

            folder, loading = self._each(fetched)
            self._each(lambda: loading.load(folder))

    def _fetch(self, manifest: Manifest, folder: Path, model: nn.Module, optimizer: Optimizer) -> TensorLoader:
        there, prefix = self._there(), checkpoint_folder(manifest.generation, manifest.step)
        known = {item.key: item for item in manifest.objects}

        def fetch(name: str) -> None:
            if name not in known:
                raise UnusableFiles(f"its manifest does not name {name}")
            there.fetch(f"{prefix}/{name}", folder / name)
            verify(manifest.model_copy(update={"objects": (known[name],)}), folder)

        fetch(METADATA)
        metadata = read_metadata((folder / METADATA).read_bytes())
        tensors = tensors_of_model(model)
        if self._start.optimizer:
            entries = optimizer_entries(metadata.state_dict_metadata, model)
            kind = self._config.training.optimizer.kind
            if {entry for found in entries.values() for entry in found} != _ENTRIES[kind]:
                raise InvalidInput(
                    f"training.from.optimizer: {self._start.uri} holds the state of another optimizer than {kind}: set "
                    "training.optimizer.kind to that one, or leave it out"
                )
            make_optimizer_state(model, optimizer, entries, scalar_names(metadata))
            tensors = tensors_of(model, optimizer)
        loading = TensorLoader(tensors, metadata)
        for name in loading.files:
            fetch(name)
        return loading

    # --- Hugging Face ---------------------------------------------------------------------------------------------

    def _import(self, files: tuple[str, ...], model: Decoder, shape: ResolvedModel) -> Origin:
        """The first rank reads; each tensor goes to all, and each takes its part of it."""
        with ExitStack() as stack:

            def fetched() -> tuple[Path, Origin]:
                sizes = sum(item.size for item in self._there().list("model") if item.key in files)
                scratch = stack.enter_context(Scratch.with_room(sizes, self._environ))
                return scratch.path, self._fetch_files(files, scratch.path)

            read: dict[str, Tensor] = {}

            def checked() -> Origin:
                folder, origin = fetched()
                read.update(stack.enter_context(_opened(folder, files, shape)))
                _check_tensors(read, model, shape)
                self._record(origin)
                return origin

            origin = self._first(checked)
            _spread(iter(read.items()), model, self._ranks)
        return origin

    def _fetch_files(self, files: tuple[str, ...], folder: Path) -> Origin:
        there = self._there()
        described = provenance(there)
        wanted = {item.key: item.sha256 for item in described.files} if described is not None else {}
        found: dict[str, str] = {}
        for name in files:
            if "/" in name or name.startswith("."):
                raise InvalidOrigin(f"{self._start.field}: its index names {name}, which is outside {self._start.uri}")
            there.fetch(name, folder / name)
            found[name] = digest_of(folder / name).sha256
            if found[name] != wanted.get(name, found[name]):
                raise UnusableFiles(f"{name} has another sha256 than was exported")
        listed = "".join(f"{name} {digest}\n" for name, digest in found.items())
        return Origin(uri=self._start.uri, sha256=hashlib.sha256(listed.encode()).hexdigest())

    # --- together -------------------------------------------------------------------------------------------------

    def _first(self, act: Callable[[], Result]) -> Result:
        """What `act` returns on the first rank, on all; or what it raises."""
        result: Result | None = None
        failure = None
        if self._ranks.first:
            result, failure = self._tried(act)
        said, failed = self._collectives.broadcast_object((result, failure))
        if failed is not None:
            raise failed
        return said  # pyright: ignore[reportReturnType]  # act returned it

    def _each(self, act: Callable[[], Result]) -> Result:
        """What `act` returns on this rank; what it raises on any is raised on all."""
        result, failure = self._tried(act)
        failed = next((said for said in self._collectives.all_gather_object(failure) if said is not None), None)
        if failed is not None:
            raise failed
        return result  # pyright: ignore[reportReturnType]  # act returned it

    def _tried(self, act: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
        try:
            return act(), None
        except (InvalidInput, ObstacleError) as error:
            return None, error
        except InvalidOrigin as error:
            return None, InvalidInput(str(error))
        except (HistoryError, ObjectNotFound, UnusableFiles) as damage:
            start = self._start
            return None, InvalidInput(f"{start.field}: {start.uri} cannot be loaded ({damage}): name something else")
        except StoreError as error:
            obstacle = obstacle_behind(error)
            return None, obstacle or InvalidInput(f"{self._start.field}: {error}")


@contextmanager
def _opened(folder: Path, files: tuple[str, ...], shape: ResolvedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors of the files under our names; they may be maps of the files, which are closed afterwards."""
    with ExitStack() as stack:
        yield import_state(_Lazy([stack.enter_context(safe_open(folder / name, "pt")) for name in files]), shape)


class _Lazy(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for. GPT-2's own files lack a prefix."""

    def __init__(self, files: list[Any]) -> None:
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no mapping

    def __getitem__(self, name: str) -> Tensor:
        known = name if name in self._files else name.removeprefix("transformer.")
        if known not in self._files:
            raise UnusableFiles(f"its weights have no tensor {name}")
        return self._files[known].get_tensor(known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _check_tensors(tensors: Mapping[str, Tensor], model: Decoder, shape: ResolvedModel) -> None:
    whole = skeleton(shape, model.rows)  # of the model this rank may have a stage only
    wanted = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    for name, tensor in tensors.items():
        if name in wanted and tuple(tensor.shape) != wanted[name]:
            raise UnusableFiles(f"{name} has shape {tuple(tensor.shape)} there and {wanted[name]} here")
        if name.endswith("bias") and not shape.bias and bool(tensor.any()):
            raise UnusableFiles(f"training.model.bias is false here, and {name} is not zero there")


@torch.no_grad()
def _spread(tensors: Iterator[tuple[str, Tensor]], model: nn.Module, ranks: Ranks) -> None:
    """From the first rank's iterator to every rank's part of the model."""
    own = dict(model.state_dict(keep_vars=True))
    collectives = Collectives(None)
    while True:
        name, tensor = next(tensors, ("", torch.empty(0))) if ranks.first else ("", torch.empty(0))
        name, size = collectives.broadcast_object((name, tuple(tensor.shape)))
        if not name:
            return
        whole = tensor.float().contiguous() if ranks.first else torch.empty(size)
        if ranks.world_size > 1:
            dist.broadcast(whole, src=0)
        if name in own:
            set_part(own[name], whole)
