"""`python -m pretrain_trainer CONFIG.json`: one rank of a training run, under torchrun or alone."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from pretrain_agent.client import AgentLink, UnattendedLink, connect
from pretrain_api.trainer import TrainerConfig
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.errors import InvalidInput
from pretrain_trainer.failures import ending
from pretrain_trainer.printed import PrintedLink
from pretrain_trainer.train import train

INTERRUPTED = 130


def main() -> None:
    """Run this rank to its end; on an error exit at once with a code of `ExitCode`."""
    rank = int(os.environ.get("RANK", "0"))
    link: AgentLink = UnattendedLink()
    try:
        link = connect(rank, int(os.environ.get("LOCAL_RANK", "0")), os.environ)
        if link.generation is None and rank == 0:
            link = PrintedLink()
        train(read_config(sys.argv[1:]), link, Checkpointer.open, os.environ)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        end = ending(error, rank)
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
        raise InvalidInput("usage: python -m pretrain_trainer CONFIG.json")
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
