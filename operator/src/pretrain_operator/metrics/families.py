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
STEP = Family("pretrain_job_step", "gauge", "Completed steps; decreases with a restore", "steps", JOB)
TARGET_STEP = Family("pretrain_job_target_step", "gauge", "Number of steps of the job", "steps", JOB)
STEPS = Family("pretrain_job_steps_total", "counter", "Completed steps, including repeated ones", "steps", JOB)
STEPS_LOST = Family("pretrain_job_lost_steps_total", "counter", "Steps lost to resolved incidents", "steps", JOB)
TOKENS = Family("pretrain_job_tokens", "gauge", "Tokens trained on up to the current step", "tokens", JOB)
SPEED = Family(
    "pretrain_job_tokens_per_second",
    "gauge",
    "Speed over the last steps; 0 while the job does not train",
    "tokens/second",
    JOB,
)
DEVICE_SPEED = Family(
    "pretrain_job_tokens_per_second_per_device",
    "gauge",
    "Speed over the last steps per training process; 0 while the job does not train",
    "tokens/second",
    JOB,
)
MFU = Family(
    "pretrain_job_mfu_ratio",
    "gauge",
    "Model FLOPs at the speed of the last steps over the peak of the devices; 0 while the job does not train, "
    "no series if the peak is unknown",
    "ratio",
    JOB,
)
STEP_PART = Family(
    "pretrain_job_step_part_seconds_total",
    "counter",
    "Step time by part, as measured by rank 0: data, compute, reduce, optimizer, stall, other",
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
    "Latest validation loss of each source; its exponential is the perplexity",
    "nats/token",
    (*JOB, "source"),
)
EVALUATION = Family(
    "pretrain_job_evaluation_metric",
    "gauge",
    "Latest results of the job's evaluation hook by name, at most 32",
    "",
    (*JOB, "metric"),
)
NOT_FINITE = Family(
    "pretrain_job_nonfinite_losses_total", "counter", "Steps whose loss or gradient was NaN or infinite", "steps", JOB
)
SPIKES = Family(
    "pretrain_job_loss_spikes_total",
    "counter",
    "Spikes of loss or gradient norm that the detector acted on",
    "",
    JOB,
)
ROLLBACKS = Family(
    "pretrain_job_rollbacks_total", "counter", "Rollbacks to an earlier state after the loss diverged", "rollbacks", JOB
)
WORKERS = Family("pretrain_job_workers", "gauge", "Workers in each state", "workers", (*JOB, "state"))
GENERATION = Family("pretrain_job_generation", "gauge", "Number of the latest generation", "", JOB)
RESTARTS = Family(
    "pretrain_job_restarts_total",
    "counter",
    "Generations ended by a fault, by cause",
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
    "Duration of each recovery phase: detect (from the fault), reform, restart, restore, first_step; "
    "their sum is pretrain_job_interruption_seconds",
    "seconds",
    (*JOB, "phase"),
    (0.1, 0.5, 1, 3, 10, 60),
)
INTERRUPTION = Family(
    "pretrain_job_interruption_seconds",
    "histogram",
    "Time from a fault to the first step after it",
    "seconds",
    JOB,
    (0.5, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 1800),
)
GOODPUT = Family("pretrain_job_goodput_seconds_total", "counter", "Time by goodput state", "seconds", (*JOB, "state"))
GOODPUT_RATIO = Family(
    "pretrain_job_goodput_ratio",
    "gauge",
    "Share of training in the time since the job was created, excluding queued and suspended",
    "ratio",
    JOB,
)
CHECKPOINT = Family(
    "pretrain_job_checkpoint_seconds",
    "histogram",
    "Time from the step boundary to the committed checkpoint",
    "seconds",
    JOB,
    (1, 3, 10, 30, 100, 300, 1000),
)
CHECKPOINT_STALL = Family(
    "pretrain_job_checkpoint_stall_seconds_total",
    "counter",
    "Time for which checkpoints stalled training",
    "seconds",
    JOB,
)
CHECKPOINT_BYTES = Family("pretrain_job_checkpoint_bytes_total", "counter", "Bytes of checkpoints saved", "bytes", JOB)
CHECKPOINT_FAILURES = Family(
    "pretrain_job_checkpoint_failures_total", "counter", "Saves without a checkpoint", "saves", JOB
)
LAST_CHECKPOINT_STEP = Family(
    "pretrain_job_last_checkpoint_step", "gauge", "Step of the checkpoint that a restart would load", "steps", JOB
)
LAST_CHECKPOINT_TIME = Family(
    "pretrain_job_last_checkpoint_timestamp_seconds",
    "gauge",
    "Time at which the checkpoint that a restart would load was committed",
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
    "Duration of a reconcile of a job: observe, decide, notify its coordinator",
    "seconds",
    (),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
QUEUE_DEPTH = Family("pretrain_operator_queue_depth", "gauge", "Jobs that wait for a reconcile", "jobs")
QUEUE_OLDEST = Family(
    "pretrain_operator_queue_oldest_seconds",
    "gauge",
    "Longest time for which a job has waited for a reconcile",
    "seconds",
)
API_CALLS = Family("pretrain_operator_api_calls_total", "counter", "Calls of the API server", "calls", ("verb", "code"))
AGENTS = Family("pretrain_operator_agents_connected", "gauge", "Agents connected", "agents")
AGENTS_REFUSED = Family("pretrain_operator_agents_refused_total", "counter", "Refused agents", "agents", ("reason",))
MESSAGES_REFUSED = Family(
    "pretrain_operator_messages_refused_total",
    "counter",
    "Refused messages of workers. OutOfBounds and WrongProcesses: the worker is treated as failed",
    "messages",
    ("reason",),
)
LEADER = Family("pretrain_operator_leader", "gauge", "1 in the leading replica, 0 in a standby")
_PROCESS = "pretrain_operator_process_"
OPERATOR_FAMILIES = (
    RECONCILE, QUEUE_DEPTH, QUEUE_OLDEST, API_CALLS, AGENTS, AGENTS_REFUSED, MESSAGES_REFUSED, LEADER,
    Family(f"{_PROCESS}start_time_seconds", "gauge", "Start time of the process", "unix seconds"),
    Family(f"{_PROCESS}cpu_seconds_total", "counter", "CPU time spent by the process", "seconds"),
    Family(f"{_PROCESS}resident_memory_bytes", "gauge", "Memory of the process", "bytes"),
    Family(f"{_PROCESS}virtual_memory_bytes", "gauge", "Address space of the process", "bytes"),
    Family(f"{_PROCESS}open_fds", "gauge", "Open files of the process", "files"),
    Family(f"{_PROCESS}max_fds", "gauge", "Limit of open files of the process", "files"),
)  # fmt: skip
