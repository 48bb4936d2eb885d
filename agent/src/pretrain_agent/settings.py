"""What the agent is started with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """The training program: a module (as in `python -m`) or the path of a script."""

    target: str
    is_module: bool
    args: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The command line, parsed."""

    coordinator: str
    job_uid: str
    slot: int
    attempt: int
    program: Program
    host: str = "127.0.0.1"
    node: str = ""
    processes: int = 1
    http_port: int = 0
    preload: tuple[str, ...] = ()
    run_dir: Path | None = None
    grace: float = 30.0
    token_file: Path | None = None
    ca_file: Path | None = None


def parse_settings(argv: Sequence[str]) -> Settings:
    """Parse the command line; on a mistake print it and exit with code 2, as argparse does."""
    parser = _parser()
    if "--" not in argv:
        own, rest = list(argv), list[str]()
    else:
        split = list(argv).index("--")
        own, rest = list(argv[:split]), list(argv[split + 1 :])
    options = parser.parse_args(own)
    return Settings(
        coordinator=options.coordinator,
        job_uid=options.job_uid,
        slot=options.slot,
        attempt=options.attempt,
        program=_program(parser, rest),
        host=options.host,
        node=options.node,
        processes=options.processes,
        http_port=options.http_port,
        preload=tuple(options.preload),
        run_dir=options.run_dir,
        grace=options.grace,
        token_file=options.token_file,
        ca_file=options.ca_file,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain-agent",
        description="Runs a worker's share of a training job: joins the generations that the coordinator forms.",
        usage="%(prog)s --coordinator URL --job-uid UID --slot N --attempt N [options] -- (-m MODULE | SCRIPT) ARGS...",
    )
    parser.add_argument("--coordinator", required=True, help="WebSocket address of the coordinator, ws:// or wss://")
    parser.add_argument("--job-uid", required=True, help="UID of the PretrainJob")
    parser.add_argument("--slot", required=True, type=_natural, help="this worker's place in the job, from 0")
    parser.add_argument("--attempt", required=True, type=_natural, help="how often this slot was started before")
    parser.add_argument("--host", default="127.0.0.1", help="address at which other workers reach this one")
    parser.add_argument("--node", default="", help="name of the machine")
    parser.add_argument("--processes", default=1, type=_positive, help="training processes to start here")
    parser.add_argument("--http-port", default=0, type=_natural, help="port of /metrics and /healthz; 0: any free one")
    parser.add_argument("--preload", action="append", default=[], help="module that ranks start with imported")
    parser.add_argument(
        "--run-dir", type=Path, help="folder for the ranks' output (logs/); absent: it goes where the agent's goes"
    )
    parser.add_argument("--grace", default=30.0, type=float, help="seconds after SIGTERM for a last checkpoint")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token for the coordinator")
    parser.add_argument(
        "--ca-file", type=Path, help="certificates (PEM) of whoever signs the coordinator's, for wss://"
    )
    return parser


def _program(parser: argparse.ArgumentParser, rest: list[str]) -> Program:
    is_module = rest[:1] == ["-m"]
    target = rest[1:] if is_module else rest
    if not target:
        parser.error("no training program: end the command with `-- SCRIPT.py ARGS...` or `-- -m MODULE ARGS...`")
    return Program(target=target[0], is_module=is_module, args=tuple(target[1:]))


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give 0 or more")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give 1 or more")
    return value
