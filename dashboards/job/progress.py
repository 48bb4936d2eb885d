"""Panels of a job: current numbers and learning curves."""

from __future__ import annotations

from dashboards.job.series import JOB, of
from dashboards.panels import GREEN, ORANGE, PHASES, RED, Query, lines, number

NOW = (
    number(
        "Phase",
        "Phase of the job, as shown by `kubectl get pretrainjobs`.",
        Query(f"{of('pretrain_job_phase')} == 1", "{{phase}}", instant=True),
        names=True,
        colours=PHASES,
        span=3,
    ),
    number(
        "Progress",
        "Completed steps over all steps.",
        Query(f"{of('pretrain_job_step')} / {of('pretrain_job_target_step')}"),
        "percentunit",
        span=3,
        decimals=1,
    ),
    number(
        "Time left",
        "At the rate of the last 15 minutes, faults included.",
        Query(
            f"({of('pretrain_job_target_step')} - {of('pretrain_job_step')})"
            f" / (sum by (namespace, name) (rate(pretrain_job_steps_total{{{JOB}}}[15m])) > 0)"
        ),
        "s",
        span=3,
        trend=False,
        none="unknown",
    ),
    number("Loss now", "Training loss of the last step.", Query(of("pretrain_job_loss")), span=3, decimals=4),
    number(
        "Tokens per second now",
        "Mean over the last steps; 0 while the job does not train.",
        Query(of("pretrain_job_tokens_per_second")),
        "short",
        span=3,
    ),
    number(
        "Training workers",
        "Members of the current generation.",
        Query(of("pretrain_job_workers", ',state="Training"')),
        span=3,
    ),
    number(
        "Goodput",
        "Share of training in the job's time, without queueing and suspension.",
        Query(of("pretrain_job_goodput_ratio")),
        "percentunit",
        ((None, RED), (0.7, ORANGE), (0.9, GREEN)),
        span=3,
        decimals=1,
    ),
    number(
        "Checkpoint age",
        "Age of the checkpoint that a restart would restore.",
        Query(f"time() - {of('pretrain_job_last_checkpoint_timestamp_seconds')}"),
        "s",
        ((None, GREEN), (1800, ORANGE), (3600, RED)),
        span=3,
        none="none yet",
    ),
)

LEARNING = (
    lines(
        "Loss",
        "Training loss of each step, and the validation loss of each held-out source.",
        (
            Query(of("pretrain_job_loss"), "training"),
            Query(of("pretrain_job_validation_loss"), "validation: {{source}}"),
        ),
        span=8,
        from_zero=False,
    ),
    lines(
        "Evaluation hook",
        "Latest results of the job's evaluation hook, by name.",
        (Query(of("pretrain_job_evaluation_metric"), "{{metric}}"),),
        span=8,
        from_zero=False,
    ),
    lines(
        "Tokens per second",
        "Speed of the job and of one training process; the latter does not depend on the number of workers.",
        (
            Query(of("pretrain_job_tokens_per_second"), "tokens per second"),
            Query(of("pretrain_job_tokens_per_second_per_device"), "per process"),
        ),
        "short",
        span=8,
    ),
    lines(
        "Gradient norm",
        "Before clipping. Spikes that precede loss spikes indicate divergence.",
        (Query(of("pretrain_job_gradient_norm"), "gradient norm"),),
        span=8,
    ),
    lines(
        "Learning rate",
        "Learning rate of the schedule.",
        (Query(of("pretrain_job_learning_rate"), "learning rate"),),
        "sci",
        span=8,
    ),
    lines(
        "Model FLOP per second",
        "6 x parameters x tokens per second: the usual estimate without attention.",
        (Query(f"6 * {of('pretrain_job_parameters')} * {of('pretrain_job_tokens_per_second')}", "model FLOP/s"),),
        "flops",
        span=8,
    ),
)
