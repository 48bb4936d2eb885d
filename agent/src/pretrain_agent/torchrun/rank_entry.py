"""Entry point of a rank: runs the training program as `python SCRIPT` or `python -m MODULE` does."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings

from pretrain_agent.settings import TrainingProgram
from pretrain_agent.system.processes import die_with_parent
from pretrain_agent.torchrun.dns_workaround import disable_reverse_dns
from pretrain_sdk.rank_link import SOCKET_VARIABLE, socket_address

LAST_WORDS_SECONDS = 1.0
LAST_WORDS_CHARACTERS = 4000


def run_rank(program: TrainingProgram) -> None:
    """Run the program in this forked process and exit as it does."""
    from pretrain_agent.torchrun.parent_death_preload import (
        SERVER_PID,
    )  # Already imported in a rank; elsewhere its import would act.

    die_with_parent(SERVER_PID)  # Overrides the weaker parent-death signal that torch has set.
    # Ranks share the agent's process group: a Ctrl-C for the agent reaches them too and must not kill them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    disable_reverse_dns()
    try:
        _run(program)
    except SystemExit as stop:
        code = _exit_code(stop)
        if code != 0:
            raise SystemExit(code) from None
        # Return instead of raise: torch treats a rank that raises SystemExit(None) as still running.
    except BaseException:
        traceback.print_exc()  # torch writes it to a file only.
        _send_last_words(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _send_last_words(text: str) -> None:
    """Send the traceback to the agent and wait until it is read."""
    line = json.dumps(
        {"kind": "last_words", "localRank": int(os.environ["LOCAL_RANK"]), "text": text[-LAST_WORDS_CHARACTERS:]}
    )
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(LAST_WORDS_SECONDS)
            agent.connect(socket_address(os.environ[SOCKET_VARIABLE]))
            agent.sendall(line.encode() + b"\n")
            agent.recv(1)
    except OSError:
        return  # The generation is over.


def _run(program: TrainingProgram) -> None:
    # The program's own __main__ module is preloaded for a fast start.
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    if program.is_module:
        sys.argv = [program.target, *program.args]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program.target, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program.target, *program.args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(program.target)))
        runpy.run_path(program.target, run_name="__main__")


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1


def warm_up(modules: tuple[str, ...]) -> None:
    """Run in the first fork, which proves that the fork server works; exit with 3 if a module is not imported."""
    missing = [module for module in modules if module not in sys.modules]
    if missing:
        print(f"pretrain-agent: could not preload {', '.join(missing)}: restarts will be slower", file=sys.stderr)
        raise SystemExit(3)
