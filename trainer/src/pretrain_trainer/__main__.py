"""`python -m pretrain_trainer CONFIG.json`: one rank of a training run, under torchrun or alone."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from pretrain_api.messages.trainer_config import ExitCode, TrainerConfig
from pretrain_sdk.rank_link import AgentLink, UnattendedLink, connect
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.loop.console_link import PrintedLink
from pretrain_trainer.loop.train import train
from pretrain_trainer.observability.failures import process_exit
from pretrain_trainer.observability.oom_snapshot import write_snapshot

INTERRUPTED = 130
HELP = """usage: pretrain-trainer CONFIG.json

One rank of a training run. CONFIG.json is what the operator resolves a PretrainJob to:
  jobName, jobUid   texts
  training          spec.training of the job; sources and tokeniser are absolute paths or s3:// URIs
  checkpoint        spec.checkpoint of the job; storage is s3 or an absolute path
  divergence        spec.recovery.divergence of the job
  cache             where shards of s3:// sources are kept: path (absent: pretrain in XDG_CACHE_HOME) and bytes
  threads           CPU threads of each process
  nanSteps          steps of data whose loss is made NaN: a fault that is injected on purpose

Alone it trains with one process and prints a line of JSON for each step. Under torchrun it is one rank of many:
  torchrun --nproc-per-node 2 -m pretrain_trainer CONFIG.json
In a worker pod the agent starts it: see `pretrain-agent --help`. Credentials for S3 come from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL where the storage names no endpoint). What somebody must
mend outside, like a bucket that is missing, is said and waited for.
Exit codes: 0 done, 2 bad input, 130 interrupted; all others are failures that the last line explains."""


def main() -> None:
    """Run this rank to its end; on an error exit at once with a code of `ExitCode`."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(HELP)
        return
    rank = int(os.environ.get("RANK", "0"))
    link: AgentLink = UnattendedLink()
    config: TrainerConfig | None = None
    try:
        link = connect(rank, int(os.environ.get("LOCAL_RANK", "0")), os.environ)
        if link.generation is None and rank == 0:
            link = PrintedLink()
        config = read_config(sys.argv[1:])
        train(config, link, Checkpointer.open, os.environ)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        end = process_exit(error, rank, config.training if config is not None else None)
        if end.exit_code is ExitCode.OUT_OF_MEMORY:
            storage = config.checkpoint.storage if config is not None else None
            number = link.generation.number if link.generation is not None else 0
            end = end.with_snapshot(write_snapshot(rank, number, storage, os.environ))
        link.report(end.report)
        link.close()
        if not end.expected:
            traceback.print_exc()
        print(f"rank {rank}: {end.message}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(end.exit_code)  # Interpreter shutdown would wait for a process group whose members are gone.
    link.close()


def read_config(arguments: list[str]) -> TrainerConfig:
    """The configuration named on the command line. Raises InvalidInput."""
    if len(arguments) != 1:
        raise InvalidInput("usage: pretrain-trainer CONFIG.json (--help says more)")
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
