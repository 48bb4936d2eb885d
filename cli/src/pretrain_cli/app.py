"""The `pretrain` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain_api.messages.export import ExportDtype
from pretrain_api.messages.profile_request import MAX_STEPS
from pretrain_cli.commands.checkpoints import checkpoints as show_checkpoints
from pretrain_cli.commands.export import ExportOptions
from pretrain_cli.commands.export import export as export_checkpoint
from pretrain_cli.commands.profile import profile as profile_job
from pretrain_cli.commands.run import run as run_job
from pretrain_cli.commands.schedule import schedule as draw_schedule
from pretrain_cli.commands.validate import validate as validate_job
from pretrain_cli.inputs.prepare import RunOptions

main = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="A PretrainJob.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field of the spec, e.g. training.steps=100."),
]


@main.callback()
def describe() -> None:
    """Pre-train language models on elastic, fault-tolerant workers."""


Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="Number of workers; widens elastic if needed.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run; default: runs/NAME.")]
Faults = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="SPEC",
        help="Inject a fault, e.g. kill:worker=1,step=60; also kill:rank, kill:agent, kill:coordinator, "
        "stop:worker, term:worker, remove:worker, add:worker, nan:step=60.",
    ),
]
TensorBoardFlag = Annotated[
    bool, typer.Option("--tensorboard", help="Also write event files to DIR/tensorboard; requires tensorboardX.")
]


@main.command()
def run(
    job: JobFile,
    workers: Workers = None,
    out: Out = None,
    sets: Sets = None,
    fault: Faults = None,
    board: TensorBoardFlag = False,
) -> None:
    """Run a job on this machine. Ctrl-C takes a checkpoint and stops; the same command resumes the run.

    Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by the user.
    """
    raise typer.Exit(run_job(RunOptions(job, workers, out, tuple(sets or ()), tuple(fault or ()), board)))


@main.command()
def validate(job: JobFile, sets: Sets = None) -> None:
    """Check a job file and print every mistake with its field and the fix.

    Exit codes: 0 valid, 2 bad input.
    """
    raise typer.Exit(validate_job(job, tuple(sets or ())))


ExportSource = Annotated[Path, typer.Argument(metavar="RUN_DIR|JOB.yaml", help="Folder of a run, or its job file.")]
ExportOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder; must be empty or not exist.")]
Step = Annotated[
    int | None, typer.Option("--step", min=0, metavar="N", help="Step of the checkpoint; default: the latest.")
]
Dtype = Annotated[ExportDtype, typer.Option("--dtype", help="Data type of the weights.")]


@main.command()
def export(run: ExportSource, out: ExportOut, step: Step = None, dtype: Dtype = "float32") -> None:
    """Export a checkpoint in Hugging Face format, for AutoModelForCausalLM and AutoTokenizer.

    Verifies every byte first; if the latest checkpoint is damaged, exports the one before. Credentials for S3 come from
    the environment. Exit codes: 0 done, 1 failed, 2 bad input.
    """
    raise typer.Exit(export_checkpoint(ExportOptions(run, out, step, dtype)))


@main.command()
def checkpoints(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR|JOB.yaml|URI", help="A run's folder, its job file, or its checkpoint.storage."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare digests.")] = False,
) -> None:
    """List the checkpoints of a run: the current one, those in the lineage, and pinned, damaged or rolled-back ones.

    Pins come from `checkpoint.retain.pin` of the job. Credentials and endpoint for S3 come from the environment.
    Exit codes: 0 done, 1 no checkpoint, damaged or unreadable, 2 bad input.
    """
    raise typer.Exit(show_checkpoints(run, as_json=as_json, verified=verify))


Plot = Annotated[Path, typer.Option("--out", metavar="FILE", help="Output file of the plot (PNG).")]


@main.command()
def schedule(job: JobFile, sets: Sets = None, out: Plot = Path("schedule.png")) -> None:
    """Show a job's learning-rate schedule as a table and a curve, and plot it."""
    raise typer.Exit(draw_schedule(job, tuple(sets or ()), out))


@main.command()
def profile(
    job: Annotated[str, typer.Argument(metavar="RUN_DIR|JOB", help="Folder of a local run, or name of a PretrainJob.")],
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=MAX_STEPS, metavar="N", help="Number of steps to record.")
    ] = 5,
    rank: Annotated[int, typer.Option("--rank", min=0, metavar="R", help="Global rank to record.")] = 0,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="Namespace of a PretrainJob; default: kubectl's current namespace."),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", min=0, metavar="SECONDS", help="Time to wait for the trace.")] = 600,
) -> None:
    """Record a torch profiler trace of a running job in its store, without restarting or blocking training.

    Exit codes: 0 recorded, 1 not recorded, 2 bad input.
    """
    raise typer.Exit(profile_job(job, namespace, steps, rank, wait))
