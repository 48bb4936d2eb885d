"""Fork server with torch and the training program's modules imported, from which ranks start.

A rank starts in 0.1 s from here, and in 2 to 4 s from a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver

from pretrain_agent.system.processes import AGENT_PID_VARIABLE
from pretrain_agent.torchrun.rank_entry import warm_up

PRELOAD = (
    "pretrain_agent.torchrun.parent_death_preload",
    "pretrain_agent.torchrun.rank_entry",
    "pretrain_sdk.rank_link",
    "torch",
    "torch.distributed",
    "torch.distributed.elastic.multiprocessing",
    "torch.optim",
    # 1.3 s: imported by the first optimizer of a process and by torch's log formatter.
    "torch._dynamo",
)


class WarmForkFailed(Exception):
    """The fork server cannot fork; the message says why."""


def start_fork_server(preload: tuple[str, ...]) -> None:
    """Start the fork server, which imports its modules in the background.

    Must be called from the main thread: the server dies with the thread that started it.
    """
    os.environ[AGENT_PID_VARIABLE] = str(os.getpid())
    multiprocessing.set_forkserver_preload([*PRELOAD, *preload])
    forkserver.ensure_running()


def fork_once(preload: tuple[str, ...]) -> bool:
    """Fork once to wait for the imports; return False if a module of `preload` could not be imported.

    Raises WarmForkFailed if it cannot fork.
    """
    process = multiprocessing.get_context("forkserver").Process(target=warm_up, args=((*PRELOAD, *preload),))
    try:
        process.start()
        process.join()
    except (OSError, EOFError) as error:
        raise WarmForkFailed(
            f"the fork server died while importing its modules ({error!r}): see the traceback above; "
            f"a module given by --preload must be importable without side effects"
        ) from error
    if process.exitcode not in (0, 3):
        raise WarmForkFailed(f"the first fork ended with exit code {process.exitcode}: see its output above")
    return process.exitcode == 0
