"""Panels of a job: its workers and ranks."""

from __future__ import annotations

from dashboards.job.series import JOB, of
from dashboards.panels import WORKERS, Query, lines

WORKER = (
    lines(
        "Workers by state",
        "All workers of the job.",
        (Query(f"{of('pretrain_job_workers')} > 0", "{{state}}"),),
        stacked=True,
        colours=WORKERS,
    ),
    lines(
        "Generation",
        "Increases whenever the set of workers changes.",
        (Query(of("pretrain_job_generation"), "generation"),),
        from_zero=False,
    ),
    lines(
        "Step time by worker",
        "Mean over the interval. All workers wait for the slowest one: look for an outlier.",
        (
            Query(
                f"sum by (slot) (rate(pretrain_worker_step_seconds_sum{{{JOB}}}[$__rate_interval]))"
                f" / (sum by (slot) (rate(pretrain_worker_step_seconds_count{{{JOB}}}[$__rate_interval])) > 0)",
                "worker {{slot}}",
            ),
        ),
        "s",
    ),
    lines(
        "Data wait",
        "Share of time that each rank waits for data. Should be close to 0.",
        (
            Query(
                f"sum by (slot, local_rank) (rate(pretrain_worker_data_wait_seconds_total{{{JOB}}}[$__rate_interval]))",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "percentunit",
    ),
    lines(
        "All-reduce wait",
        "Share of time that each rank waits for the all-reduce. The rank that waits least is the slowest one.",
        (
            Query(
                "sum by (slot, local_rank) "
                f'(rate(pretrain_worker_step_part_seconds_total{{{JOB},part="reduce"}}[$__rate_interval]))',
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "percentunit",
    ),
    lines(
        "Memory of the ranks",
        "Resident memory of each training process, current and peak.",
        (
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_memory_bytes{{{JOB}}})",
                "worker {{slot}} rank {{local_rank}}",
            ),
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_memory_peak_bytes{{{JOB}}})",
                "peak, worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "bytes",
    ),
    lines(
        "Memory of the accelerators",
        "Memory used by tensors, its peak, and memory held by torch's allocator. No curve: no accelerators.",
        (
            Query(
                f"sum by (slot, local_rank, kind) (pretrain_worker_device_memory_bytes{{{JOB}}})",
                "{{kind}}, worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "bytes",
    ),
    lines(
        "Loss contribution by rank",
        "Contributions add up to the loss. An outlier indicates a rank with wrong results.",
        (
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_loss_contribution{{{JOB}}})",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        from_zero=False,
    ),
    lines(
        "Rank starts by reason",
        "Starts of the current workers' ranks, by the reason of their generation.",
        (Query(f"sum by (reason) (pretrain_worker_restarts_total{{{JOB}}})", "{{reason}}"),),
        stacked=True,
        span=6,
    ),
    lines(
        "Step by worker",
        "Workers differ only while some restart.",
        (
            Query(
                f"max by (slot) (pretrain_worker_step{{{JOB}}} and pretrain_worker_generation > 0)", "worker {{slot}}"
            ),
        ),
        span=6,
    ),
    lines(
        "Connection to the coordinator",
        "1 while the agent is connected. Training continues without a connection; step reports beyond the buffer are "
        "dropped.",
        (
            Query(f"min by (slot) (pretrain_worker_connected{{{JOB}}})", "worker {{slot}}"),
            Query(
                f"sum(rate(pretrain_worker_reports_dropped_total{{{JOB}}}[$__rate_interval]))",
                "reports dropped per second",
            ),
        ),
        span=6,
    ),
    lines(
        "Allocation retries",
        "Per second. Retries mean that the accelerator is nearly out of memory: lower training.batch.microBatch.",
        (
            Query(
                f"sum by (slot, local_rank) (rate(pretrain_worker_alloc_retries_total{{{JOB}}}[$__rate_interval]))",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        span=6,
    ),
)
