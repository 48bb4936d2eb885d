"""MFU: model FLOP/s as a share of the devices' peak."""

from __future__ import annotations

import torch

from pretrain_api.estimate.flops import flops_per_token
from pretrain_api.messages.protocol import Generation
from pretrain_api.spec.model import ResolvedModel
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.observability.cpu_peak import PEAKS_FOLDER, CpuPeak
from pretrain_trainer.observability.gpu_peaks import Arithmetic, gpu_peak


class Utilization:
    """MFU of a run. Assumes that all ranks have devices of this rank's kind."""

    def __init__(self, flops_per_token: int, world_size: int, peak: float | CpuPeak | None) -> None:
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak = peak

    @classmethod
    def of(
        cls,
        model: ResolvedModel,
        rows: int,
        precision: str,
        ranks: Ranks,
        generation: Generation | None,
        environment: Environment,
    ) -> Utilization:
        """Return the MFU of a model of this shape, trained in `precision`. Measures nothing yet."""
        peak: float | CpuPeak | None
        if ranks.device.type == "cpu":
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            on_machine = ranks_per_machine(ranks.world_size, generation, environment.local_world_size)
            peak = CpuPeak(dtype, on_machine, environment.user_cache / PEAKS_FOLDER)
        else:
            peak = gpu_peak(torch.cuda.get_device_name(ranks.device), arithmetic(precision))
        return cls(flops_per_token(model, rows), ranks.world_size, peak)

    def step_done(self) -> None:
        """Count a step: the peak of a CPU is measured after some steps, off the path of a recovery."""
        if isinstance(self._peak, CpuPeak):
            self._peak.step_done()

    def of_speed(self, tokens_per_second: float) -> float | None:
        """Return the share of the peak at this speed of the whole job; None if the peak is unknown."""
        share = self._share(tokens_per_second)
        if share is not None and share > 1 and isinstance(self._peak, CpuPeak):
            self._peak.doubt()
            return self._share(tokens_per_second)
        return share

    def _share(self, tokens_per_second: float) -> float | None:
        peak = self._peak.flops if isinstance(self._peak, CpuPeak) else self._peak
        return tokens_per_second * self._flops_per_token / (peak * self._world_size) if peak else None


def ranks_per_machine(world_size: int, generation: Generation | None, local_world_size: int) -> int:
    """Return the number of ranks that share a machine: the workers of a local run have one address."""
    if generation is None:
        return local_world_size
    return -(-world_size // max(1, len({member.host for member in generation.members})))


def arithmetic(precision: str) -> Arithmetic:
    """Return the arithmetic of a GPU's matrix products at `training.precision`."""
    if precision == "fp32":
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "fp8" if precision == "fp8" else "bf16"
