"""Advice for a run that exceeds its memory: its peak, and the settings that lower it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pretrain_api.spec.training import Training
from pretrain_trainer.observability.memory import accelerator_memory, process_memory

_GIB = 1 << 30


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a rank, in bytes."""

    peak: int
    capacity: int
    owner: str
    """"the device" or "this host"."""

    @classmethod
    def now(cls) -> PeakMemory:
        """Measure the accelerator where there is one, else this process, whose host may run others."""
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            use = accelerator_memory(device)
            if use is not None:
                return cls(use.peak_bytes, torch.cuda.get_device_properties(device).total_memory, "the device")
        return cls(process_memory().peak_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this host")


def advice(training: Training, held: PeakMemory) -> str:
    """Return a clause with the peak memory and the changes that lower it, the least intrusive first."""
    changes = list(_changes(training))
    remedy = "; or ".join(changes) if changes else "use devices with more memory, or a smaller model"
    return (
        f"this rank used {held.peak / _GIB:.2f} GiB at its peak, of {held.capacity / _GIB:.2f} GiB of {held.owner}: "
        f"{remedy}"
    )


def _changes(training: Training) -> Iterator[str]:
    smaller = smaller_micro_batch(training.batch.sequences, training.batch.micro_batch)
    if smaller is not None:
        yield (
            f"set training.batch.microBatch to {smaller} (it is {training.batch.micro_batch}; the global batch "
            "stays as it is)"
        )
    if training.activation_checkpointing != "full":
        yield "set training.activationCheckpointing to full"
    if training.parallelism.shard == "none":
        yield "set training.parallelism.shard to full, which divides the state among the workers"
    if training.precision == "fp32":
        yield "set training.precision to bf16"


def smaller_micro_batch(sequences: int, micro_batch: int) -> int | None:
    """Return the largest divisor of the global batch that is at most half of this one; None if this is 1."""
    return next((size for size in range(micro_batch // 2, 0, -1) if sequences % size == 0), None)
