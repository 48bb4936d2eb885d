"""`pretrain-operator`: the operator process. Exit status 0 after SIGTERM or SIGINT, 1 after an error that needs a
restart, 2 for invalid options."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import structlog

from pretrain_operator.kubernetes.server.app import running_operator
from pretrain_operator.kubernetes.server.options import BadOptions, Options, parse_options

SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = structlog.get_logger()


async def serve(options: Options) -> int:
    """Run until SIGTERM, SIGINT or an error; returns the exit status."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    async with running_operator(options) as running:
        stopping, ending = asyncio.create_task(stop.wait()), asyncio.create_task(running.ended())
        await asyncio.wait((stopping, ending), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            ending.cancel()
            log.info("stopping; agents keep training")
            return 0
        error = ending.result()
        log.error("exiting for a restart", error=repr(error), exc_info=error)
        return 1


def main() -> None:
    """Run with the flags of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-8s] %(name)s: %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # one line for every probe
    try:
        options = parse_options(sys.argv[1:])
        sys.exit(asyncio.run(serve(options)))
    except BadOptions as error:
        print(f"pretrain-operator: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
