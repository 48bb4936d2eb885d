"""`python -m pretrain_trainer CONFIG.json`: one rank of a training run, under torchrun or alone."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from pretrain_api.messages.reports import ReportBody
from pretrain_api.messages.trainer_config import ExitCode, TrainerConfig
from pretrain_sdk.rank_link import AgentLink, UnattendedLink, connect
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.loop.train import MakeCallbacks, no_callbacks, train
from pretrain_trainer.observability.failures import process_exit
from pretrain_trainer.observability.oom_snapshot import write_snapshot

INTERRUPTED = 130
HELP = """usage: pretrain-trainer CONFIG.json

One rank of a training run. CONFIG.json is the PretrainJob as the operator resolves it:
  jobName, jobUid   texts
  training          spec.training of the job; sources and tokeniser are absolute paths or s3:// URIs
  checkpoint        spec.checkpoint of the job; storage is s3 or an absolute path
  divergence        spec.recovery.divergence of the job
  cache             cache of the shards of s3:// sources: path (default: pretrain in XDG_CACHE_HOME) and bytes
  threads           CPU threads of each process
  nanSteps          data steps whose loss becomes NaN: an injected fault

Started alone it trains with one process and prints a line of JSON per step. Under torchrun it is one of many ranks:
  torchrun --nproc-per-node 2 -m pretrain_trainer CONFIG.json
In a worker pod the agent starts it: see `pretrain-agent --help`. Credentials for S3 come from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL where the storage names no endpoint). Obstacles outside the
job, such as a missing bucket, are reported, and training resumes when they are resolved.
Exit codes: 0 done, 2 invalid input, 130 interrupted; all others are failures that the last line explains."""


class PrintedLink(UnattendedLink):
    """The link of rank 0 without an agent: prints reports as JSON lines on standard output."""

    def report(self, body: ReportBody) -> None:
        """Print a report."""
        print(body.to_json(), flush=True)


def main(make_callbacks: MakeCallbacks = no_callbacks) -> None:
    """Run this rank to its end; after an error exit at once with a code of `ExitCode`."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(HELP)
        return
    environment = Environment.of(os.environ)
    link: AgentLink = UnattendedLink()
    config: TrainerConfig | None = None
    try:
        link = connect(environment.rank, environment.local_rank, os.environ)
        if link.generation is None and environment.rank == 0:
            link = PrintedLink()
        config = read_config(sys.argv[1:])
        train(config, link, Checkpointer.open, environment, make_callbacks)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        _fail(error, environment, link, config)
    link.close()


def _fail(error: BaseException, environment: Environment, link: AgentLink, config: TrainerConfig | None) -> NoReturn:
    """Report the error and exit, without the interpreter's shutdown: it waits for peers, which may be gone."""
    end = process_exit(error, environment.rank, config.training if config is not None else None)
    if end.exit_code is ExitCode.OUT_OF_MEMORY:
        storage = config.checkpoint.storage if config is not None else None
        number = link.generation.number if link.generation is not None else 0
        end = end.with_snapshot(write_snapshot(environment.rank, number, storage, environment))
    link.report(end.report)
    link.close()
    if not end.expected:
        traceback.print_exc()
    print(f"rank {environment.rank}: {end.message}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(end.exit_code)


def read_config(arguments: list[str]) -> TrainerConfig:
    """Read the configuration named on the command line. Raises InvalidInput."""
    if len(arguments) != 1:
        raise InvalidInput("usage: pretrain-trainer CONFIG.json (see --help)")
    path = Path(arguments[0])
    try:
        return TrainerConfig.from_json(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}): name a trainer configuration") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{path}: {field}: {first['msg']}") from error


if __name__ == "__main__":
    main()
