"""Initial weights (`training.from`) from another run's checkpoint, or from a folder in Hugging Face's format.

The origin is checked before anything is written, recorded once beside the lineage, and loaded after every digest is
verified. Only a start without a checkpoint of its own loads it.
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
class _ChosenOrigin:
    """The origin that rank 0 found."""

    manifest: Manifest | None
    """Manifest of another run's checkpoint; None: Hugging Face."""
    files: tuple[str, ...]
    origin: Origin | None
    """None until the files are read."""


class InitialWeights:
    """Origin of a run's initial weights. Its methods are collective; they raise on all ranks alike."""

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
        """Return the initial weights of a job; None if they are drawn from the seed. Opens nothing yet."""
        start = config.training.origin
        return cls(start, config, identity, tokenizer, ranks, environ) if start is not None else None

    @property
    def _storage(self) -> Storage:
        return self._config.checkpoint.storage

    def check(self) -> None:
        """Check that the origin is usable, or was used already; write nothing. Raises InvalidInput or ObstacleError."""
        self._on_first_rank(lambda: None if self._has_begun() else self._choose())

    def load(self, model: Decoder, optimizer: Optimizer, shape: ResolvedModel) -> Origin:
        """Record the origin, then load the weights, and the optimizer's state if configured.

        Raises InvalidInput when the origin is damaged or of another model, and an ObstacleError when it cannot be
        fetched now: then it may be called again.
        """
        chosen = self._on_first_rank(self._choose)
        if chosen.manifest is not None:
            assert chosen.origin is not None  # always for another run
            self._on_first_rank(lambda: self._record(chosen.origin))
            self._load_checkpoint(chosen.manifest, model, optimizer)
            return chosen.origin
        return self._import(chosen.files, model, shape)

    def _has_begun(self) -> bool:
        own = open_store(self._storage, self._environ)
        return recorded(own, self._start) is not None and bool(read_listing(own).manifests)

    def _choose(self) -> _ChosenOrigin:
        own = open_store(self._storage, self._environ)
        pinned = recorded(own, self._start)
        there = self._there()
        if self._start.run is not None:
            manifest, origin = choose_checkpoint(there, self._start, self._identity, pinned)
            return _ChosenOrigin(manifest, (), pinned if pinned and pinned.sha256 == origin.sha256 else origin)
        return _ChosenOrigin(None, weight_files(there, self._start, self._identity, self._tokenizer), None)

    def _there(self) -> Readable:
        return open_origin(self._start, self._storage, self._environ)

    def _record(self, origin: Origin | None) -> None:
        """Put the record of the origin. It replaces one of an earlier start that saved no checkpoint."""
        assert origin is not None  # the files are read
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

            folder, loading = self._on_each_rank(fetched)
            self._on_each_rank(lambda: loading.load(folder))

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
        """Read the files on rank 0, and broadcast each tensor to all ranks, which take their parts of it."""
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

            origin = self._on_first_rank(checked)
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

    # --- agreement of the ranks -----------------------------------------------------------------------------------

    def _on_first_rank(self, act: Callable[[], Result]) -> Result:
        """Call `act` on rank 0; return its result, or raise its error, on all ranks."""
        result: Result | None = None
        failure = None
        if self._ranks.first:
            result, failure = self._tried(act)
        said, failed = self._collectives.broadcast_object((result, failure))
        if failed is not None:
            raise failed
        return said  # pyright: ignore[reportReturnType]  # act returned it

    def _on_each_rank(self, act: Callable[[], Result]) -> Result:
        """Call `act` on each rank and return its own result; an error on any rank is raised on all."""
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
    """Yield the tensors of the files under our names; they may map the files, which are closed afterwards."""
    with ExitStack() as stack:
        yield import_state(_LazyTensors([stack.enter_context(safe_open(folder / name, "pt")) for name in files]), shape)


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read on access. GPT-2's own files lack a prefix."""

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
    whole = skeleton(shape, model.rows)  # this rank may have a part of the model only
    wanted = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    for name, tensor in tensors.items():
        if name in wanted and tuple(tensor.shape) != wanted[name]:
            raise UnusableFiles(f"{name} has shape {tuple(tensor.shape)} there and {wanted[name]} here")
        if name.endswith("bias") and not shape.bias and bool(tensor.any()):
            raise UnusableFiles(f"training.model.bias is false here, and {name} is not zero there")


@torch.no_grad()
def _spread(tensors: Iterator[tuple[str, Tensor]], model: nn.Module, ranks: Ranks) -> None:
    """Broadcast the tensors of rank 0's iterator, and set every rank's part of the model."""
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
