"""Measurements of a rank's steps: peaks, MFU, parts of the time, memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_api.messages.reports import MemoryUse, Progress, StepDone
from pretrain_api.status.records import STEP_PARTS, parts_of
from pretrain_trainer.observability import cpu_peak as cpupeak
from pretrain_trainer.observability.cpu_peak import MEASURED_AFTER, CpuPeak
from pretrain_trainer.observability.gpu_peaks import GPUS, gpu_peak
from pretrain_trainer.observability.memory import from_counters, process_memory
from pretrain_trainer.observability.mfu import Utilization, arithmetic, ranks_per_machine
from pretrain_trainer.observability.step_report import LATELY_STEPS, lately
from pretrain_trainer.observability.step_timing import (
    COMPUTED,
    DATA,
    REDUCED,
    UPDATED,
    DeviceStepMarks,
    HostStepMarks,
    StepTimer,
)
from support.operator.world import a_step
from support.trainer.world import a_config, a_corpus, a_generation, run_training

# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [(0.001, LATELY_STEPS), (3.0, 4), (60.0, 1)],
)
def test_the_steps_of_the_last_seconds_are_known_to_all_ranks(seconds: float, kept: int) -> None:
    known: tuple[StepDone, ...] = ()
    for step in range(1, 200):
        known = lately(known, a_step(step).model_copy(update={"seconds": seconds}))

    assert [done.step for done in known] == list(range(200 - kept, 200))


# --- peaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_the_peak_of_a_gpu_is_the_dense_rate_of_its_datasheet(name: str, kind: Any, teraflops: float) -> None:
    assert gpu_peak(name, kind) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA T1000", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
    ],
)
def test_an_unknown_rate_of_a_gpu_is_not_guessed(name: str, kind: Any) -> None:
    assert gpu_peak(name, kind) is None


def test_no_rate_is_one_with_sparsity() -> None:
    """Every generation computes fp8 at twice bf16's rate and tf32 at half of it, or at fp32's."""
    for pattern, rates in GPUS:
        if rates.bf16 and rates.fp8:
            assert rates.fp8 / rates.bf16 == pytest.approx(2, rel=0.03), pattern
        if rates.bf16 and rates.tf32 and rates.tf32 > rates.fp32:
            assert rates.bf16 / rates.tf32 == pytest.approx(2, rel=0.03), pattern


def test_mfu_is_the_share_of_all_devices() -> None:
    assert Utilization(flops_per_token=100, world_size=4, peak=1000.0).of_speed(20.0) == 0.5
    assert Utilization(flops_per_token=100, world_size=4, peak=None).of_speed(20.0) is None


def test_the_arithmetic_of_fp32_is_what_torch_may_use() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert arithmetic("fp32") == "fp32"
        torch.set_float32_matmul_precision("high")
        assert arithmetic("fp32") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


# --- the CPU's --------------------------------------------------------------------------------------------------------


def steps(peak: CpuPeak, number: int) -> float | None:
    for _ in range(number):
        peak.step_done()
    return peak.flops


def test_a_cpu_is_measured_once_and_after_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(cpupeak, "measured", lambda dtype: measured.append(dtype) or 1e10)
    first, second = (CpuPeak(torch.float32, 1, tmp_path) for _ in range(2))

    assert steps(first, MEASURED_AFTER - 1) is None
    assert steps(first, 1) == pytest.approx(1e10)
    assert steps(second, 2) == pytest.approx(1e10)
    steps(first, 20), steps(second, 20)
    assert measured == [torch.float32]


def test_a_peak_that_the_run_exceeds_is_measured_again_and_never_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter((10.0, 50.0))  # The machine was busy at first.
    monkeypatch.setattr(cpupeak, "measured", lambda _: next(rates))
    peak, later = (CpuPeak(torch.float32, 1, tmp_path) for _ in range(2))
    run = Utilization(flops_per_token=1, world_size=1, peak=peak)
    steps(peak, MEASURED_AFTER)

    assert [run.of_speed(speed) for speed in (5.0, 25.0, 100.0)] == [0.5, 0.5, 2.0]
    assert steps(later, 2) == 50.0


def test_a_cpu_is_measured_where_the_figure_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpupeak, "measured", lambda _: 1e10)
    (tmp_path / "file").write_text("")

    assert steps(CpuPeak(torch.float32, 1, tmp_path / "file"), MEASURED_AFTER)


def test_ranks_that_share_the_cpus_have_a_part_of_the_peak_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpupeak, "measured", lambda _: 1e10)
    monkeypatch.setattr(cpupeak.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cpupeak.torch, "get_num_threads", lambda: 1)

    assert [steps(CpuPeak(torch.float32, ranks, tmp_path), MEASURED_AFTER) for ranks in (1, 2, 4)] == [
        1e10, 1e10, 5e9,
    ]  # fmt: skip


def test_a_measured_peak_is_one_that_a_product_reaches() -> None:
    assert 1e8 < cpupeak.measured(torch.float32) < 1e14


def test_the_workers_of_a_local_run_share_a_machine() -> None:
    apart = a_generation(workers=3)
    members = [member.model_copy(update={"host": f"10.0.0.{member.rank}"}) for member in apart.members]

    assert ranks_per_machine(3, apart, 1) == 3
    assert ranks_per_machine(3, apart.model_copy(update={"members": tuple(members)}), 1) == 1
    assert ranks_per_machine(8, None, 4) == 4


# --- the parts of a step ----------------------------------------------------------------------------------------------


@dataclass
class Device:
    """A device that runs its queue only when it is waited for."""

    clock: float = 0.0
    queue: list[Any] = field(default_factory=list)

    def work(self, milliseconds: float) -> None:
        self.queue.append(milliseconds)

    def wait(self) -> None:
        for item in self.queue:
            if isinstance(item, FakeEvent):
                item.at = self.clock
            else:
                self.clock += item
        self.queue.clear()


@dataclass(eq=False)
class FakeEvent:
    device: Device
    at: float | None = None

    def record(self) -> None:
        self.at = None
        self.device.queue.append(self)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end_event: Any, /) -> float:
        assert self.query(), "read before the device came to it"
        assert end_event.query(), "read before the device came to it"
        return end_event.at - (self.at or 0.0)


def test_on_a_gpu_nothing_blocks_and_the_update_is_reported_a_step_later() -> None:
    device = Device()
    marks = DeviceStepMarks(lambda: FakeEvent(device))
    told = []
    for step in (1, 2, 3):
        marks.mark(DATA)
        device.work(10 * step)
        marks.mark(COMPUTED)
        device.work(5)
        device.wait()  # The loss is fetched.
        marks.mark(REDUCED)
        device.wait()  # An event on an idle device is there at once.
        device.work(step)
        marks.mark(UPDATED)
        told.append(marks.parts())

    assert told == [
        pytest.approx((0.010, 0.005, 0.0)),
        pytest.approx((0.020, 0.005, 0.001)),
        pytest.approx((0.030, 0.005, 0.002)),
    ]


def test_parts_of_a_step_on_a_cpu_add_up() -> None:
    pace = StepTimer(100, HostStepMarks())
    pace.begin()
    pace.data_read()
    pace.computed()
    pace.reduced()
    times = pace.end(stall=2.0)

    assert times.seconds >= times.data + times.compute + times.reduce + times.optimizer + times.stall
    assert min(times.data, times.compute, times.reduce, times.optimizer) > 0


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_an_accelerator_is_what_its_allocator_counts() -> None:
    counters = {
        "allocated_bytes": {"all": {"current": 1, "peak": 3}},
        "reserved_bytes": {"all": {"current": 5, "peak": 7}},
        "num_alloc_retries": 2,
    }

    assert from_counters(counters) == MemoryUse(bytes=1, peak_bytes=3, reserved_bytes=5, alloc_retries=2)


def test_memory_of_a_process_is_what_lies_in_ram() -> None:
    use = process_memory()

    assert 10 * 2**20 < use.bytes <= use.peak_bytes
    assert use.reserved_bytes is None


# --- a run ------------------------------------------------------------------------------------------------------------


def test_ranks_report_the_parts_of_a_step(tmp_path: Path) -> None:
    first, second = run_training(a_config(a_corpus(tmp_path), {"steps": MEASURED_AFTER + 1}), 2)

    for report in (*first.steps, *second.of(Progress)):
        parts = parts_of(report)
        assert tuple(parts) == STEP_PARTS
        assert min(parts["compute"], parts["reduce"], parts["optimizer"]) > 0
        assert sum(parts.values()) == pytest.approx(report.seconds, abs=1e-5)
    assert all(step.memory is not None and step.memory.peak_bytes > 2**20 for step in first.steps)
    assert all(report.memory is None for report in second.of(Progress))
    assert 0 < (first.steps[-1].mfu or 0.0) < 2
