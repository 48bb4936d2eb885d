"""Peak speed of GPUs by arithmetic, the denominator of MFU.

Rates are the vendors' dense rates, never those "with sparsity", which are twice as high. MFU is unknown where a rate is
missing (the device has no units for it), for devices that are not listed, and for parts of a device (MIG).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Arithmetic = Literal["fp32", "tf32", "bf16", "fp8"]
"""Arithmetic of matrix products. `tf32`: fp32 tensors whose products torch may compute in tf32."""

TERA = 1e12


@dataclass(frozen=True)
class GpuRates:
    """TFLOP/s of one device without sparsity; None where it has no units for the arithmetic."""

    bf16: float | None
    fp32: float
    tf32: float | None = None
    fp8: float | None = None

    def of(self, arithmetic: Arithmetic) -> float | None:
        """Return the FLOP/s, or None."""
        rate = {"fp32": self.fp32, "tf32": self.tf32 or self.fp32, "bf16": self.bf16, "fp8": self.fp8}[arithmetic]
        return None if rate is None else rate * TERA


GPUS: tuple[tuple[str, GpuRates], ...] = (
    # Patterns of torch.cuda.get_device_name(); the first match counts, so special models come first.
    # NVIDIA Blackwell: DGX B200 and GB200 NVL72 datasheets, each divided by its GPUs.
    (r"\bGB200\b", GpuRates(bf16=2500, fp32=80, tf32=1250, fp8=5000)),
    (r"\bB200\b", GpuRates(bf16=2250, fp32=75, tf32=1125, fp8=4500)),
    # NVIDIA Hopper: H100 and H200 Tensor Core GPU datasheets. H20 and H800 are the versions for China.
    (r"\bH200 NVL\b", GpuRates(bf16=835.5, fp32=60, tf32=417.5, fp8=1670.5)),
    (r"\bH100 NVL\b", GpuRates(bf16=835.5, fp32=60, tf32=417.5, fp8=1670.5)),
    (r"\bH(100|800) PCIe\b", GpuRates(bf16=756, fp32=51, tf32=378, fp8=1513)),
    (r"\b(GH200|H200|H100|H800)\b", GpuRates(bf16=989.5, fp32=67, tf32=494.5, fp8=1979)),
    (r"\bH20\b", GpuRates(bf16=148, fp32=44, tf32=74, fp8=296)),
    # NVIDIA Ada Lovelace: L40S, L40 and L4 datasheets; whitepaper of the architecture, appendix A (fp32 accumulation).
    (r"\bL40S\b", GpuRates(bf16=362, fp32=91.6, tf32=183, fp8=733)),
    (r"\bL40\b", GpuRates(bf16=181, fp32=90.5, tf32=90.5, fp8=362)),
    (r"\bL4\b", GpuRates(bf16=121, fp32=30.3, tf32=60, fp8=242.5)),
    (r"\bRTX 4090\b(?! (D|Laptop))", GpuRates(bf16=165.2, fp32=82.6, tf32=82.6, fp8=330.3)),
    # NVIDIA Ampere: A100, A10 and A10G datasheets; GA102 whitepaper, appendix A.
    (r"\bA(100|800)\b", GpuRates(bf16=312, fp32=19.5, tf32=156)),
    (r"\bA10G\b", GpuRates(bf16=70, fp32=35, tf32=35)),
    (r"\bA10\b", GpuRates(bf16=125, fp32=31.2, tf32=62.5)),
    (r"\bRTX 3090\b(?! Ti)", GpuRates(bf16=71, fp32=35.6, tf32=35.6)),
    # NVIDIA Volta: V100 datasheet. Its 112 to 130 TFLOP/s are of fp16; it has no bf16.
    (r"\bV100S\b", GpuRates(bf16=None, fp32=16.4)),
    (r"\bV100-(PCIE|DGXS)\b", GpuRates(bf16=None, fp32=14)),
    (r"\bV100\b", GpuRates(bf16=None, fp32=15.7)),
    # AMD: Instinct MI300X, MI325X and MI250X data sheets; of the last torch sees each half as a device.
    (r"\bMI3(00|25)X\b", GpuRates(bf16=1307.4, fp32=163.4, tf32=653.7, fp8=2614.9)),
    (r"\bMI250X\b", GpuRates(bf16=191.5, fp32=47.9)),
)


def gpu_peak(name: str, arithmetic: Arithmetic) -> float | None:
    """Return the FLOP/s of a GPU of this name, without sparsity; None if unknown."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((rates.of(arithmetic) for pattern, rates in GPUS if re.search(pattern, name)), None)
