"""Variants of saving whose cost for the step loop is measured."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save
from work import Ours, Work

from pretrain_trainer.checkpoint.dcp.state import tensors_of


class SaveVariant(Protocol):
    """Variant of saving; the step loop is blocked during `begin`."""

    def begin(self, work: Work) -> None:
        """Start a save."""
        ...

    @property
    def busy(self) -> bool:
        """True while a save is in progress."""
        ...

    def finish(self) -> None:
        """Wait for the save to end."""
        ...


class OursAsync(Ours):
    @property
    def busy(self) -> bool:
        return self.generation._saver.step_in_flight is not None

    def finish(self) -> None:  # type: ignore[override]
        super().finish()


class TorchSave:
    """Synchronous torch.save."""

    busy = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saves = 0

    def begin(self, work: Work) -> None:
        self._saves += 1
        torch.save(tensors_of(work.model, work.optimizer), self._folder / f"{self._saves % 2}.pt")

    def finish(self) -> None: ...


class DcpAsync:
    """DCP async_save with defaults: a thread, and new staging memory for each save."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saves = 0
        self._future: Future[Any] | None = None

    def begin(self, work: Work) -> None:
        self._saves += 1
        target = self._folder / f"step-{self._saves}"
        self._future = cast(
            "Future[Any]", async_save(dict(tensors_of(work.model, work.optimizer)), checkpoint_id=str(target))
        )
        shutil.rmtree(self._folder / f"step-{self._saves - 2}", ignore_errors=True)

    @property
    def busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()
