"""Panels of a job: time by state, steps and tokens."""

from __future__ import annotations

from dashboards.job.series import JOB, of
from dashboards.panels import PHASES, SPENT, STEP, Query, lines, timeline

TIME = (
    timeline(
        "Phase over time",
        "Phase of the job over time.",
        Query(f"{of('pretrain_job_phase')} == 1", "{{phase}}"),
        PHASES,
        height=8,
        span=12,
    ),
    lines(
        "Time by state",
        "Every second of the job is in exactly one state; green is training.",
        (
            Query(
                f"sum by (state) (rate(pretrain_job_goodput_seconds_total{{{JOB}}}[$__rate_interval])) > 0", "{{state}}"
            ),
        ),
        "percentunit",
        shares=True,
        colours=SPENT,
    ),
    lines(
        "Step time by part",
        "Mean seconds of each part on rank 0. Reduce is the all-reduce wait: network and slowest rank.",
        (
            Query(
                f"sum by (part) (rate(pretrain_job_step_part_seconds_total{{{JOB}}}[$__rate_interval]))"
                f" / on () group_left () (sum(rate(pretrain_job_steps_total{{{JOB}}}[$__rate_interval])) > 0)",
                "{{part}}",
            ),
        ),
        "s",
        stacked=True,
        colours=STEP,
    ),
    lines(
        "MFU",
        "Model FLOPs over the devices' peak (CPU: over the fastest measured matrix product). No curve: the peak of "
        "these devices is unknown.",
        (Query(of("pretrain_job_mfu_ratio"), "MFU"),),
        "percentunit",
    ),
    lines(
        "Steps done and checkpointed",
        "The gap is what a fault would cost; drops are steps lost and repeated.",
        (
            Query(of("pretrain_job_step"), "step"),
            Query(of("pretrain_job_last_checkpoint_step"), "step of the last checkpoint"),
        ),
        span=12,
    ),
    lines(
        "Tokens",
        "Tokens trained on up to the current step.",
        (Query(of("pretrain_job_tokens"), "tokens"),),
        "short",
        span=12,
    ),
)
