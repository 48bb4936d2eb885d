"""What runs in a rank's process: the training program, as `python SCRIPT` or `python -m MODULE` would run it."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings

from pretrain_agent.settings import Program
from pretrain_agent.system.parent_death import die_with_parent
from pretrain_agent.torchrun.dns_workaround import ask_for_no_names
from pretrain_sdk.rank_link import SOCKET_VARIABLE, socket_address

LAST_WORDS_SECONDS = 1.0
LAST_WORDS_CHARACTERS = 4000


def run_rank(program: Program) -> None:
    """Run the program in this freshly forked process and exit as it would."""
    from pretrain_agent.torchrun.parent_death_preload import (
        SERVER_PID,
    )  # In a rank it is there already; elsewhere its import would act.

    die_with_parent(SERVER_PID)  # torch has just set a softer parent-death signal in this process.
    # The ranks are in the agent's process group: a Ctrl-C meant for the agent reaches them too and must not kill them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ask_for_no_names()
    try:
        _run(program)
    except SystemExit as stop:
        code = _exit_code(stop)
        if code != 0:
            raise SystemExit(code) from None
        # Returned, not raised: torch takes a rank that leaves by SystemExit(None) for one that still works.
    except BaseException:
        traceback.print_exc()  # torch writes it to a file only.
        _send_last_words(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _send_last_words(text: str) -> None:
    """Tell the agent why this rank ends, and wait until it has read it."""
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
        return  # The generation is over: nobody asks why.


def _run(program: Program) -> None:
    # Preloading a program's own __main__ module is what makes its start quick.
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
    """The first fork: prove that the fork server works; exit with 3 if it could not import one of `modules`."""
    missing = [module for module in modules if module not in sys.modules]
    if missing:
        print(f"pretrain-agent: could not preload {', '.join(missing)}: restarts will be slower", file=sys.stderr)
        raise SystemExit(3)
