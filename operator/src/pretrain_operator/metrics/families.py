"""Metric families of the operator: of each job, and of the process itself."""

from __future__ import annotations

from typing import get_args

from pretrain_api.status.job import GoodputState, Phase
from pretrain_api.status.metrics import Family
from pretrain_operator.facts.fact import INTENDED, Cause

RECOVERY_PHASES = ("detect", "reform", "restart", "restore", "first_step")
"""In order: each starts where the one before ends."""
PHASES: tuple[Phase, ...] = get_args(Phase)
GOODPUT_STATES: tuple[GoodputState, ...] = get_args(GoodputState)
WORKER_STATES = ("Starting", "Joined", "Training", "Leaving", "Ended", "Lost")
RESTART_CAUSES = tuple(cause for cause in get_args(Cause) if cause not in INTENDED)

JOB = ("namespace", "name")
"""Labels of every metric of a job."""

PHASE = Family("pretrain_job_phase", "gauge", "1 for the phase that the job is in, else 0", "", (*JOB, "phase"))
STEP = Family("pretrain_job_step", "gauge", "Steps completed; falls back with a restore", "steps", JOB)
TARGET_STEP = Family("pretrain_job_target_step", "gauge", "Steps after which the job is done", "steps", JOB)
STEPS = Family(
    "pretrain_job_steps_total", "counter", "Steps done, those included that were done before and lost", "steps", JOB
)
STEPS_LOST = Family("pretrain_job_lost_steps_total", "counter", "Steps lost by faults that were overcome", "steps", JOB)
TOKENS = Family("pretrain_job_tokens", "gauge", "Tokens trained on up to the present step", "tokens", JOB)
SPEED = Family(
    "pretrain_job_tokens_per_second",
    "gauge",
    "Speed over the last steps; 0 while it does not train",
    "tokens/second",
    JOB,
)
DEVICE_SPEED = Family(
    "pretrain_job_tokens_per_second_per_device",
    "gauge",
    "Speed over the last steps by training process; 0 while it does not train",
    "tokens/second",
    JOB,
)
MFU = Family(
    "pretrain_job_mfu_ratio",
    "gauge",
    "FLOPs of the model over the peak of its devices, at the speed of the last steps; 0 while it does not train, no "
    "series where the peak is not known",
    "ratio",
    JOB,
)
STEP_PART = Family(
    "pretrain_job_step_part_seconds_total",
    "counter",
    "Time of steps by part, as rank 0 saw it: data, compute, reduce, optimizer, stall, other",
    "seconds",
    (*JOB, "part"),
)
PARAMETERS = Family("pretrain_job_parameters", "gauge", "Parameters of the model", "parameters", JOB)
LOSS = Family("pretrain_job_loss", "gauge", "Training loss of the last step", "nats/token", JOB)
GRADIENT_NORM = Family("pretrain_job_gradient_norm", "gauge", "Gradient norm of the last step, unclipped", "", JOB)
LEARNING_RATE = Family("pretrain_job_learning_rate", "gauge", "Learning rate of the last step", "", JOB)
VALIDATION_LOSS = Family(
    "pretrain_job_validation_loss",
    "gauge",
    "Last validation loss of each source; its exponential is the perplexity",
    "nats/token",
    (*JOB, "source"),
)
EVALUATION = Family(
    "pretrain_job_evaluation_metric",
    "gauge",
    "What the job's evaluation hook returned last, by name; at most 32 names at a time",
    "",
    (*JOB, "metric"),
)
NOT_FINITE = Family(
    "pretrain_job_nonfinite_losses_total", "counter", "Steps whose loss or gradient was NaN or infinite", "steps", JOB
)
SPIKES = Family(
    "pretrain_job_loss_spikes_total",
    "counter",
    "Spikes of loss or gradient norm that something was done about",
    "",
    JOB,
)
ROLLBACKS = Family(
    "pretrain_job_rollbacks_total", "counter", "Returns to an earlier state because the loss diverged", "rollbacks", JOB
)
WORKERS = Family("pretrain_job_workers", "gauge", "Workers in each state", "workers", (*JOB, "state"))
GENERATION = Family("pretrain_job_generation", "gauge", "Number of the newest generation", "", JOB)
RESTARTS = Family(
    "pretrain_job_restarts_total",
    "counter",
    "Generations that a fault ended, by its cause",
    "generations",
    (*JOB, "cause"),
)
FAILURES = Family(
    "pretrain_job_failures_since_progress",
    "gauge",
    "Failures since the last checkpoint progress that count against spec.recovery.budget",
    "failures",
    JOB,
)
RECOVERY = Family(
    "pretrain_job_recovery_seconds",
    "histogram",
    "Duration of each phase of a recovery: detect (from the fault), reform, restart, restore, first_step; "
    "they add up to pretrain_job_interruption_seconds",
    "seconds",
    (*JOB, "phase"),
    (0.1, 0.5, 1, 3, 10, 60),
)
INTERRUPTION = Family(
    "pretrain_job_interruption_seconds",
    "histogram",
    "From a fault to the first step after it",
    "seconds",
    JOB,
    (0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 1800),
)
GOODPUT = Family(
    "pretrain_job_goodput_seconds_total", "counter", "Time by what it was spent on", "seconds", (*JOB, "state")
)
GOODPUT_RATIO = Family(
    "pretrain_job_goodput_ratio",
    "gauge",
    "Share of training in all time since the job began, but for queued and suspended",
    "ratio",
    JOB,
)
CHECKPOINT = Family(
    "pretrain_job_checkpoint_seconds",
    "histogram",
    "From the step boundary to the checkpoint being in force",
    "seconds",
    JOB,
    (1, 3, 10, 30, 100, 300, 1000),
)
CHECKPOINT_STALL = Family(
    "pretrain_job_checkpoint_stall_seconds_total",
    "counter",
    "Time that training waited for checkpoints",
    "seconds",
    JOB,
)
CHECKPOINT_BYTES = Family("pretrain_job_checkpoint_bytes_total", "counter", "Bytes of checkpoints saved", "bytes", JOB)
CHECKPOINT_FAILURES = Family(
    "pretrain_job_checkpoint_failures_total", "counter", "Saves that came to no checkpoint", "saves", JOB
)
LAST_CHECKPOINT_STEP = Family(
    "pretrain_job_last_checkpoint_step", "gauge", "Step of the checkpoint that a restart would load", "steps", JOB
)
LAST_CHECKPOINT_TIME = Family(
    "pretrain_job_last_checkpoint_timestamp_seconds",
    "gauge",
    "When the checkpoint that a restart would load came into force",
    "unix seconds",
    JOB,
)

JOB_FAMILIES = (
    PHASE, STEP, TARGET_STEP, STEPS, STEPS_LOST, TOKENS, SPEED, DEVICE_SPEED, MFU, STEP_PART, PARAMETERS, LOSS,
    GRADIENT_NORM, LEARNING_RATE, VALIDATION_LOSS, EVALUATION, NOT_FINITE, SPIKES, ROLLBACKS, WORKERS, GENERATION,
    RESTARTS, FAILURES, RECOVERY, INTERRUPTION, GOODPUT, GOODPUT_RATIO, CHECKPOINT, CHECKPOINT_STALL, CHECKPOINT_BYTES,
    CHECKPOINT_FAILURES, LAST_CHECKPOINT_STEP, LAST_CHECKPOINT_TIME,
)  # fmt: skip

RECONCILE = Family(
    "pretrain_operator_reconcile_seconds",
    "histogram",
    "Duration of a look at a job: observe, decide, tell its coordinator",
    "seconds",
    (),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
QUEUE_DEPTH = Family("pretrain_operator_queue_depth", "gauge", "Jobs that wait to be looked at", "jobs")
QUEUE_OLDEST = Family(
    "pretrain_operator_queue_oldest_seconds", "gauge", "How long the job that waits longest has waited", "seconds"
)
API_CALLS = Family("pretrain_operator_api_calls_total", "counter", "Calls of the API server", "calls", ("verb", "code"))
AGENTS = Family("pretrain_operator_agents_connected", "gauge", "Agents connected", "agents")
AGENTS_REFUSED = Family(
    "pretrain_operator_agents_refused_total", "counter", "Agents that were turned away", "agents", ("reason",)
)
LEADER = Family("pretrain_operator_leader", "gauge", "1 in the replica that acts, 0 in one that stands by")
_PROCESS = "pretrain_operator_process_"
OPERATOR_FAMILIES = (
    RECONCILE, QUEUE_DEPTH, QUEUE_OLDEST, API_CALLS, AGENTS, AGENTS_REFUSED, LEADER,
    Family(f"{_PROCESS}start_time_seconds", "gauge", "When the process started", "unix seconds"),
    Family(f"{_PROCESS}cpu_seconds_total", "counter", "CPU time spent by the process", "seconds"),
    Family(f"{_PROCESS}resident_memory_bytes", "gauge", "Memory of the process", "bytes"),
    Family(f"{_PROCESS}virtual_memory_bytes", "gauge", "Address space of the process", "bytes"),
    Family(f"{_PROCESS}open_fds", "gauge", "Open files of the process", "files"),
    Family(f"{_PROCESS}max_fds", "gauge", "Files that the process may have open", "files"),
)  # fmt: skip
