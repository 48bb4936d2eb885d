"""One job: is it well, how fast is it, what is it worth, and what went wrong."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.frame import a_dashboard, job_variables
from dashboards.look import (
    CAUSES,
    GREEN,
    ORANGE,
    PHASES,
    RECOVERY,
    RED,
    SPENT,
    STEP,
    WORKERS,
    Query,
    lines,
    number,
    timeline,
)

JOB = 'namespace="$namespace",name="$name"'


def of(metric: str, more: str = "") -> str:
    """A gauge of the job, once however many operators show it while one takes over from another."""
    return f"max without (instance, pod, endpoint, service, container, job) ({metric}{{{JOB}{more}}})"


def dashboard() -> builder.Dashboard:
    """The dashboard of one job."""
    return a_dashboard(
        "Pre-training / Job",
        "pretrain-job",
        "One PretrainJob: progress, losses, where its time goes, its workers, faults and checkpoints.",
        job_variables(all_of_them=False),
        (
            ("Now", NOW),
            ("Learning", LEARNING),
            ("Time", TIME),
            ("Workers", WORKER),
            ("Faults", FAULTS),
            ("Checkpoints", CHECKPOINTS),
        ),
        since="now-6h",
    )


NOW = (
    number(
        "Phase",
        "The phase of the job, as `kubectl get pretrainjobs` shows it.",
        Query(f"{of('pretrain_job_phase')} == 1", "{{phase}}", instant=True),
        names=True,
        colours=PHASES,
        span=3,
    ),
    number(
        "Progress",
        "Steps completed, of those that the job shall do.",
        Query(f"{of('pretrain_job_step')} / {of('pretrain_job_target_step')}"),
        "percentunit",
        span=3,
        decimals=1,
    ),
    number(
        "Time left",
        "At the pace of the last 15 minutes, faults included.",
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
        "Over the last steps; 0 while the job does not train.",
        Query(of("pretrain_job_tokens_per_second")),
        "short",
        span=3,
    ),
    number(
        "Workers that train",
        "Members of the present generation.",
        Query(of("pretrain_job_workers", ',state="Training"')),
        span=3,
    ),
    number(
        "Goodput",
        "Share of training in all time since the job began, without queueing and suspension.",
        Query(of("pretrain_job_goodput_ratio")),
        "percentunit",
        ((None, RED), (0.7, ORANGE), (0.9, GREEN)),
        span=3,
        decimals=1,
    ),
    number(
        "Checkpoint's age",
        "How old the checkpoint is that a restart would load.",
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
        "Evaluations of your own",
        "What the job's evaluation hook returned last, by name.",
        (Query(of("pretrain_job_evaluation_metric"), "{{metric}}"),),
        span=8,
        from_zero=False,
    ),
    lines(
        "Tokens per second",
        "Speed of the whole job, and of one training process: that one stays where it is when workers come and go.",
        (
            Query(of("pretrain_job_tokens_per_second"), "tokens per second"),
            Query(of("pretrain_job_tokens_per_second_per_device"), "of one process"),
        ),
        "short",
        span=8,
    ),
    lines(
        "Gradient norm",
        "Before clipping. Spikes that come before those of the loss announce a divergence.",
        (Query(of("pretrain_job_gradient_norm"), "gradient norm"),),
        span=8,
    ),
    lines(
        "Learning rate",
        "As the schedule gives it.",
        (Query(of("pretrain_job_learning_rate"), "learning rate"),),
        "sci",
        span=8,
    ),
    lines(
        "Model FLOP per second",
        "6 x parameters x tokens per second, the usual estimate without attention.",
        (Query(f"6 * {of('pretrain_job_parameters')} * {of('pretrain_job_tokens_per_second')}", "model FLOP/s"),),
        "flops",
        span=8,
    ),
)

TIME = (
    timeline(
        "Phase over time",
        "Each phase in its colour.",
        Query(f"{of('pretrain_job_phase')} == 1", "{{phase}}"),
        PHASES,
        height=8,
        span=12,
    ),
    lines(
        "Where the time goes",
        "Every second of the job is in exactly one state; green is progress.",
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
        "A step's time",
        "Mean seconds of each part, as rank 0 sees it. Reduce is what is waited for the sums of all ranks: for the "
        "network, and for the slowest rank.",
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
        "FLOPs of the model over the peak of its devices (of a CPU: over the fastest matrix product that it was seen "
        "to do). No curve: the peak of these devices is not known.",
        (Query(of("pretrain_job_mfu_ratio"), "MFU"),),
        "percentunit",
    ),
    lines(
        "Steps done and steps kept",
        "The lines part where steps are lost and done again.",
        (
            Query(of("pretrain_job_step"), "step"),
            Query(of("pretrain_job_last_checkpoint_step"), "step of the last checkpoint"),
        ),
        span=12,
    ),
    lines(
        "Tokens",
        "Trained on up to the present step.",
        (Query(of("pretrain_job_tokens"), "tokens"),),
        "short",
        span=12,
    ),
)

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
        "Goes up by one whenever the set of workers changes.",
        (Query(of("pretrain_job_generation"), "generation"),),
        from_zero=False,
    ),
    lines(
        "Step time by worker",
        "Mean over the interval. All workers wait for the slowest; a line apart from the others is a suspect.",
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
        "Waiting for data",
        "Share of the time that each rank's steps wait for data. It should be next to nothing.",
        (
            Query(
                f"sum by (slot, local_rank) (rate(pretrain_worker_data_wait_seconds_total{{{JOB}}}[$__rate_interval]))",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "percentunit",
    ),
    lines(
        "Waiting for other ranks",
        "Share of the time that each rank waits for the sums of all. Who waits least is the one that the others wait "
        "for.",
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
        "Resident memory of each training process, now and at most.",
        (
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_memory_bytes{{{JOB}}})",
                "worker {{slot}} rank {{local_rank}}",
            ),
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_memory_peak_bytes{{{JOB}}})",
                "at most, worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "bytes",
    ),
    lines(
        "Memory of the accelerators",
        "Used by tensors, at most so far, and held by torch's allocator. No curve: there are none.",
        (
            Query(
                f"sum by (slot, local_rank, kind) (pretrain_worker_device_memory_bytes{{{JOB}}})",
                "{{kind}}, worker {{slot}} rank {{local_rank}}",
            ),
        ),
        "bytes",
    ),
    lines(
        "Each rank's part of the loss",
        "Together they are the loss. A rank that is far from its share computes something else than the others.",
        (
            Query(
                f"sum by (slot, local_rank) (pretrain_worker_loss_contribution{{{JOB}}})",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        from_zero=False,
    ),
    lines(
        "Starts of ranks, and why",
        "How often the ranks of the present workers were started, by the reason of their generation.",
        (Query(f"sum by (reason) (pretrain_worker_restarts_total{{{JOB}}})", "{{reason}}"),),
        stacked=True,
        span=6,
    ),
    lines(
        "Steps as workers see them",
        "Behind one another they are only while some start anew.",
        (
            Query(
                f"max by (slot) (pretrain_worker_step{{{JOB}}} and pretrain_worker_generation > 0)", "worker {{slot}}"
            ),
        ),
        span=6,
    ),
    lines(
        "Contact with the coordinator",
        "1 while the coordinator knows the worker's agent. Training goes on without contact; reports of steps that "
        "nobody took are lost.",
        (
            Query(f"min by (slot) (pretrain_worker_connected{{{JOB}}})", "worker {{slot}}"),
            Query(
                f"sum(rate(pretrain_worker_reports_dropped_total{{{JOB}}}[$__rate_interval]))",
                "reports lost per second",
            ),
        ),
        span=6,
    ),
    lines(
        "Allocations tried again",
        "Per second. An accelerator gives cached memory back before it is out of memory: lower "
        "training.batch.microBatch.",
        (
            Query(
                f"sum by (slot, local_rank) (rate(pretrain_worker_alloc_retries_total{{{JOB}}}[$__rate_interval]))",
                "worker {{slot}} rank {{local_rank}}",
            ),
        ),
        span=6,
    ),
)

FAULTS = (
    lines(
        "Restarts and rollbacks by cause",
        "Generations that a fault ended; losses that spiked, and returns to an earlier state for that.",
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
        "Interruptions, by phase of the recovery",
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
        "At spec.recovery.budget the job ends. A later checkpoint sets it back to 0.",
        (Query(of("pretrain_job_failures_since_progress"), "failures"),),
        span=4,
        limit=3,
    ),
    number(
        "Steps lost",
        "In the time range shown, by faults that were overcome.",
        Query(f"sum(increase(pretrain_job_lost_steps_total{{{JOB}}}[$__range]))", instant=True),
        "short",
        span=2,
        decimals=0,
    ),
    number(
        "Losses not finite",
        "Steps of the time range shown whose loss or gradient was NaN or infinite.",
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
        "From the step boundary to the checkpoint being in force; training goes on meanwhile.",
        (
            Query(
                f"sum(increase(pretrain_job_checkpoint_seconds_sum{{{JOB}}}[15m]))"
                f" / (sum(increase(pretrain_job_checkpoint_seconds_count{{{JOB}}}[15m])) > 0)",
                "mean",
            ),
            Query(
                "histogram_quantile(0.95, sum by (le) "
                f"(increase(pretrain_job_checkpoint_seconds_bucket{{{JOB}}}[15m])))",
                "95 % are done in",
            ),
        ),
        "s",
        span=8,
    ),
    lines(
        "Stages of a checkpoint",
        "Mean of each stage on the worker that commits. Only the copy holds up training.",
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
        "Mean of each stage from the start of rank 0 to a state that stands, over all starts of the present workers.",
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
        "Checkpoint's age over time",
        "A fault costs at most this much, and the steps of it.",
        (Query(f"time() - {of('pretrain_job_last_checkpoint_timestamp_seconds')}", "age"),),
        "s",
        span=8,
        limit=3600,
    ),
    lines(
        "Training held up by checkpoints",
        "Share of the time.",
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
        "Bytes saved, saves that failed",
        "Bytes per second into the store; a failed save is tried again at the next interval.",
        (
            Query(f"sum(rate(pretrain_job_checkpoint_bytes_total{{{JOB}}}[$__rate_interval]))", "bytes per second"),
            Query(f"sum(increase(pretrain_job_checkpoint_failures_total{{{JOB}}}[$__rate_interval]))", "failed saves"),
        ),
        "short",
        span=8,
    ),
)
