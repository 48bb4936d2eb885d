"""`pretrain-operator`: the operator as a process. Ends with 0 when it was told to, with 1 when it must be restarted."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import structlog

from pretrain_operator.kubernetes.server.app import running_operator
from pretrain_operator.kubernetes.server.options import BadOptions, Options, parse_options

SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = structlog.get_logger()


async def serve(options: Options) -> int:
    """Run until told to end; returns the exit status."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def own_signals() -> None:
        for number in SIGNALS:
            loop.add_signal_handler(number, told.set)

    async with running_operator(options, own_signals) as running:
        stopping, ending = asyncio.create_task(told.wait()), asyncio.create_task(running.ended())
        await asyncio.wait((stopping, ending), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if told.is_set():
            ending.cancel()
            log.info("told to end: training goes on")
            return 0
        error = ending.result()
        log.error("the operator ends, to be started again", error=repr(error), exc_info=error)
        return 1


def main() -> None:
    """Run with the flags of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-8s] %(name)s: %(message)s")
    for chatty in ("kopf.objects", "kopf.activities", "aiohttp.access"):  # a line for every status and every probe
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        options = parse_options(sys.argv[1:], os.environ)
        sys.exit(asyncio.run(serve(options)))
    except BadOptions as error:
        print(f"pretrain-operator: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
