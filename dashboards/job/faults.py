"""Panels of a job: faults and checkpoints."""

from __future__ import annotations

from dashboards.job.series import JOB, of
from dashboards.panels import CAUSES, GREEN, RECOVERY, RED, Query, lines, number

FAULTS = (
    lines(
        "Restarts and rollbacks by cause",
        "Generations ended by a fault, loss spikes and rollbacks.",
        (
            Query(
                f"sum by (cause) (increase(pretrain_job_restarts_total{{{JOB}}}[$__rate_interval])) > 0", "{{cause}}"
            ),
            Query(f"sum(increase(pretrain_job_loss_spikes_total{{{JOB}}}[$__rate_interval])) > 0", "LossSpike"),
            Query(f"sum(increase(pretrain_job_rollbacks_total{{{JOB}}}[$__rate_interval])) > 0", "RolledBack"),
        ),
        bars=True,
        stacked=True,
        span=8,
        colours=CAUSES,
    ),
    lines(
        "Interruptions by recovery phase",
        "Mean seconds from the fault to the first step after it, over the last hour.",
        (
            Query(
                f"sum by (phase) (increase(pretrain_job_recovery_seconds_sum{{{JOB}}}[1h]))"
                f" / (sum by (phase) (increase(pretrain_job_recovery_seconds_count{{{JOB}}}[1h])) > 0)",
                "{{phase}}",
            ),
        ),
        "s",
        stacked=True,
        span=8,
        colours=RECOVERY,
    ),
    lines(
        "Failures since the last progress",
        "The job fails at spec.recovery.budget. A new checkpoint resets it to 0.",
        (Query(of("pretrain_job_failures_since_progress"), "failures"),),
        span=4,
        limit=3,
    ),
    number(
        "Steps lost",
        "Steps lost to recovered faults in the time range shown.",
        Query(f"sum(increase(pretrain_job_lost_steps_total{{{JOB}}}[$__range]))", instant=True),
        "short",
        span=2,
        decimals=0,
    ),
    number(
        "Non-finite losses",
        "Steps in the time range shown with a NaN or infinite loss or gradient.",
        Query(f"sum(increase(pretrain_job_nonfinite_losses_total{{{JOB}}}[$__range]))", instant=True),
        "short",
        ((None, GREEN), (0.5, RED)),
        span=2,
        decimals=0,
    ),
)

CHECKPOINTS = (
    lines(
        "Duration of checkpoints",
        "From the step boundary to the commit; training continues meanwhile.",
        (
            Query(
                f"sum(increase(pretrain_job_checkpoint_seconds_sum{{{JOB}}}[15m]))"
                f" / (sum(increase(pretrain_job_checkpoint_seconds_count{{{JOB}}}[15m])) > 0)",
                "mean",
            ),
            Query(
                "histogram_quantile(0.95, sum by (le) "
                f"(increase(pretrain_job_checkpoint_seconds_bucket{{{JOB}}}[15m])))",
                "95th percentile",
            ),
        ),
        "s",
        span=8,
    ),
    lines(
        "Stages of a checkpoint",
        "Mean of each stage on the committing worker. Only the copy stalls training.",
        (
            Query(
                f"sum by (stage) (increase(pretrain_worker_save_seconds_sum{{{JOB}}}[15m]))"
                f" / (sum by (stage) (increase(pretrain_worker_save_seconds_count{{{JOB}}}[15m])) > 0)",
                "{{stage}}",
            ),
        ),
        "s",
        span=8,
        stacked=True,
    ),
    lines(
        "Stages of a start",
        "Mean of each stage from the start of rank 0 to the restored state, over all starts of the current workers.",
        (
            Query(
                f"sum by (stage) (pretrain_worker_restore_seconds_sum{{{JOB}}})"
                f" / sum by (stage) (pretrain_worker_restore_seconds_count{{{JOB}}})",
                "{{stage}}",
            ),
        ),
        "s",
        span=8,
        stacked=True,
    ),
    lines(
        "Checkpoint age over time",
        "Upper bound of the training time lost to a fault.",
        (Query(f"time() - {of('pretrain_job_last_checkpoint_timestamp_seconds')}", "age"),),
        "s",
        span=8,
        limit=3600,
    ),
    lines(
        "Checkpoint stall",
        "Share of time that training waits for checkpoints.",
        (
            Query(
                f"sum(rate(pretrain_job_checkpoint_stall_seconds_total{{{JOB}}}[$__rate_interval]))",
                "copying to staging memory",
            ),
        ),
        "percentunit",
        span=8,
    ),
    lines(
        "Bytes saved and failed saves",
        "Bytes per second to the store; a failed save is retried at the next interval.",
        (
            Query(f"sum(rate(pretrain_job_checkpoint_bytes_total{{{JOB}}}[$__rate_interval]))", "bytes per second"),
            Query(f"sum(increase(pretrain_job_checkpoint_failures_total{{{JOB}}}[$__rate_interval]))", "failed saves"),
        ),
        "short",
        span=8,
    ),
)
