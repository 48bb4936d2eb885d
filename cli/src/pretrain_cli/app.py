"""The `pretrain` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain_api.messages.export import ExportDtype
from pretrain_api.messages.profile_request import MAX_STEPS
from pretrain_cli.commands.checkpoints import View
from pretrain_cli.commands.checkpoints import checkpoints as show_checkpoints
from pretrain_cli.commands.export import Wanted
from pretrain_cli.commands.export import export as export_checkpoint
from pretrain_cli.commands.profile import profile as profile_job
from pretrain_cli.commands.run import run as run_job
from pretrain_cli.commands.schedule import schedule as draw_schedule
from pretrain_cli.commands.validate import validate as validate_job
from pretrain_cli.inputs.prepare import Order

main = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="A PretrainJob.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field of the spec, e.g. training.steps=100."),
]


@main.callback()
def describe() -> None:
    """Pre-train language models on workers that come and go."""


Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="So many workers; elastic is widened to hold them.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run; absent: runs/NAME.")]
Faults = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="SPEC",
        help="Inject a fault: kill:worker=1,step=60; also kill:rank, kill:agent, kill:coordinator, stop:worker, "
        "term:worker, remove:worker, add:worker, nan:step=60.",
    ),
]
Board = Annotated[
    bool, typer.Option("--tensorboard", help="Write event files to DIR/tensorboard as well; needs tensorboardX.")
]


@main.command()
def run(
    job: JobFile,
    workers: Workers = None,
    out: Out = None,
    sets: Sets = None,
    fault: Faults = None,
    board: Board = False,
) -> None:
    """Run a job on this machine. Ctrl-C takes a checkpoint and ends; the same command again goes on.

    Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by the user.
    """
    raise typer.Exit(run_job(Order(job, workers, out, tuple(sets or ()), tuple(fault or ()), board)))


@main.command()
def validate(job: JobFile, sets: Sets = None) -> None:
    """Print every mistake of a job file with its path and what is allowed."""
    raise typer.Exit(validate_job(job, tuple(sets or ())))


ExportFrom = Annotated[Path, typer.Argument(metavar="RUN_DIR|JOB.yaml", help="Folder of a run, or its job file.")]
ExportTo = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; empty or not there yet.")]
Step = Annotated[int | None, typer.Option("--step", min=0, metavar="N", help="That checkpoint; absent: the newest.")]
Dtype = Annotated[ExportDtype, typer.Option("--dtype", help="Of the weights.")]


@main.command()
def export(run: ExportFrom, out: ExportTo, step: Step = None, dtype: Dtype = "float32") -> None:
    """Write a checkpoint in Hugging Face format, for AutoModelForCausalLM and AutoTokenizer.

    Every byte is verified first; a damaged newest checkpoint gives way to the one before. Checkpoints in S3 take
    credentials from the environment. Exit codes: 0 done, 1 failed, 2 bad input.
    """
    raise typer.Exit(export_checkpoint(Wanted(run, out, step, dtype)))


@main.command()
def checkpoints(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR|JOB.yaml|URI", help="A run's folder, its job file, or its checkpoint.storage."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare the digests.")] = False,
) -> None:
    """List the checkpoints of a run: which one is in force, which are on the line, pinned, damaged or given up.

    Pins are `checkpoint.retain.pin` of the job. Checkpoints in S3 take credentials and endpoint from the environment.
    Exit codes: 0 done, 1 none there, damaged, or not to be read, 2 bad input.
    """
    raise typer.Exit(show_checkpoints(run, View(as_json, verify)))


Plot = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the plot goes, a PNG.")]


@main.command()
def schedule(job: JobFile, sets: Sets = None, out: Plot = Path("schedule.png")) -> None:
    """Draw a job's learning rate: a table and a curve here, and a plot."""
    raise typer.Exit(draw_schedule(job, tuple(sets or ()), out))


@main.command()
def profile(
    job: Annotated[str, typer.Argument(metavar="RUN_DIR|JOB", help="Folder of a local run, or name of a PretrainJob.")],
    steps: Annotated[int, typer.Option("--steps", min=1, max=MAX_STEPS, metavar="N", help="Steps to record.")] = 5,
    rank: Annotated[int, typer.Option("--rank", min=0, metavar="R", help="Global rank that is recorded.")] = 0,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Of a PretrainJob; absent: kubectl's present one.")
    ] = None,
    wait: Annotated[float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait for it.")] = 600,
) -> None:
    """Have a running job put a trace of torch's profiler into its store; nothing is restarted, nobody waits for it.

    Exit codes: 0 the trace is there, 1 there is none, 2 bad input.
    """
    raise typer.Exit(profile_job(job, namespace, steps, rank, wait))
