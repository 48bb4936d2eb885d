"""Benchmark of saving and restoring against raw disk, raw S3 and torch.

    python benchmarks/checkpoint/run.py [--parameters 60e6] [--rounds 6] [--folder DIR] [--bucket NAME]

A decoder with AdamW (12 bytes per parameter) in one process with one thread, like a rank. Figures are medians; ours and
the baseline take turns in alternating order. On a busy machine compare CPU seconds, or give `--patience`: bandwidth
measurements then wait for idle cores. The idle share is in the JSON.

Bandwidth: our checkpointer (copy, digest, upload, manifest; and fetch, verify, load into new memory) against
the same bytes written sequentially and synced, or read sequentially with cold caches; for S3 against boto3's multipart
upload and ranged download with as many threads. The service is AWS_ENDPOINT_URL, or else a moto process, which is slow.

Step loop: stall of our save against a synchronous `torch.save` and `dcp.async_save` with defaults; time of steps during
a save over that of others; additional peak memory over the size of the state, for the first save and later ones. Each
variant runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import machine

HERE = Path(__file__).resolve().parent
GOAL = 0.65
LIMITS = {"folder": "write and fsync, read", "s3": "boto3"}
WAYS = ("ours, folder", "ours, s3", "torch.save", "dcp.async_save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=60e6)
    parser.add_argument("--rounds", type=int, default=6, help="even, since variants alternate")
    parser.add_argument("--folder", default="/tmp", help="on the measured disk")
    parser.add_argument("--bucket", default="pretrain-bench", help="created if missing")
    parser.add_argument("--patience", type=float, default=0, help="maximum seconds to wait for idle cores")
    parser.add_argument("--only", choices=(*LIMITS, "steps"), help="run only this part")
    arguments = parser.parse_args()
    order = {name: getattr(arguments, name) for name in ("parameters", "rounds", "folder", "bucket", "patience")}
    bandwidths: dict[str, dict[str, Any]] = {}
    ways: dict[str, dict[str, Any]] = {}
    with s3_service() as (service, environ), Console(stderr=True).status("") as status:
        for place in [name for name in LIMITS if arguments.only in (None, name)]:
            status.update(f"bandwidth, {place}")
            bandwidths[place] = measured(order | {"what": f"bandwidth {place}"}, environ)
        for way in WAYS if arguments.only in (None, "steps") else ():
            status.update(f"the step loop, {way}")
            ways[way] = measured(order | {"what": f"beside {way}"}, environ)
    show(bandwidths, ways, service)


@contextmanager
def s3_service() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Provide an S3 service: its name and the environment to reach it."""
    if url := os.environ.get("AWS_ENDPOINT_URL"):
        yield url, os.environ
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    moto = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await_answer(url, moto)
        yield (
            "moto",
            {
                **os.environ,
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "benchmark",
            },
        )
    finally:
        moto.terminate()
        moto.wait()


def await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the service listens."""
    while process.poll() is None:
        try:
            urlopen(url).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit("moto did not start")


def measured(order: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Run `measure.py` and return its result."""
    done = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), json.dumps(order)],
        stdout=subprocess.PIPE, text=True, env={**environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{order['what']} failed")
    return json.loads(done.stdout.splitlines()[-1])


def median(rounds: list[dict[str, Any]], name: str) -> float:
    """Return the median over the rounds that have a value; 0 without any."""
    return statistics.median([found[name] for found in rounds if found.get(name) is not None] or [0.0])


def show(bandwidths: dict[str, dict[str, Any]], ways: dict[str, dict[str, Any]], service: str) -> None:
    """Print the tables, then one line of JSON."""
    console = Console(width=150)
    figures: dict[str, Any] = {"benchmark": "checkpoint", "s3": service}
    if bandwidths:
        console.print(bandwidth_table(bandwidths, figures))
    if ways:
        console.print(steps_table(ways, figures))
    print(json.dumps(figures | {"machine": machine()}))


def bandwidth_table(bandwidths: dict[str, dict[str, Any]], figures: dict[str, Any]) -> Table:
    """Build the table of MB/s, ratio to the baseline (median over rounds) and CPU seconds of both."""
    table = Table(title=f"Bandwidth, MB/s (goal: at least {GOAL} of the limit)")
    left = ("place", "what", "seconds by stage")
    for column in ("place", "MB", "what", "ours", "limit", "from, to", "ratio", "from, to", "CPU s", left[-1]):
        table.add_column(column, justify="left" if column in left else "right")
    for place, found in bandwidths.items():
        for what, plain, prefix in (("save", "plainSave", "save "), ("restore", "plainRestore", "restore ")):
            ratios = [one[plain] / one[what] for one in found["rounds"]]
            ours, limit = (found["bytes"] / median(found["rounds"], name) / 1e6 for name in (what, plain))
            limits = sorted(found["bytes"] / one[plain] / 1e6 for one in found["rounds"])
            cpu = {name: median(found["rounds"], f"{name}Cpu") for name in (what, plain)}
            stages = {
                name.removeprefix(prefix): median(found["rounds"], name)
                for name in found["rounds"][0]
                if name.startswith(prefix)
            }
            table.add_row(
                place, f"{found['bytes'] / 1e6:.0f}", what, f"{ours:.0f}", f"{limit:.0f}",
                f"{limits[0]:.0f}, {limits[-1]:.0f}", f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}, {max(ratios):.2f}",
                f"{cpu[what]:.2f}, {cpu[plain]:.2f}",
                ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items()),
            )  # fmt: skip
            figures[f"{place} {what}"] = {
                "bytesPerSecond": ours * 1e6, "limit": limit * 1e6, "ratio": statistics.median(ratios),
                "ratios": ratios, "limits": [limit * 1e6 for limit in limits], "stages": stages,
                "cpuSeconds": cpu[what], "limitCpuSeconds": cpu[plain],
                "idle": [min(one[f"{what}Idle"], one[f"{plain}Idle"]) for one in found["rounds"]],
            }  # fmt: skip
    return table


def steps_table(ways: dict[str, dict[str, Any]], figures: dict[str, Any]) -> Table:
    """Build the table of each variant's cost for the step loop."""
    table = Table(title="The step loop (seconds; memory over the size of the state)")
    columns = (
        "way",
        "stall",
        "first stall",
        "steps beside",
        "step time",
        "lost per save",
        "CPU",
        "memory, first",
        "later",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, found in ways.items():
        first, later = found["rounds"][0], found["rounds"][1:]
        beside = median(later, "beside")
        table.add_row(
            way, f"{median(later, 'stall'):.3f}", f"{first['stall']:.3f}", f"{median(later, 'stepsBeside'):.0f}",
            f"x {beside:.2f}" if beside else "–", f"{median(later, 'lost'):.2f}", f"{median(later, 'cpu'):.2f}",
            f"{first['memory']:.2f}", f"{median(later, 'memory'):.2f}",
        )  # fmt: skip
        figures[way] = {"first": first} | {name: median(later, name) for name in first if name != "first"}
    return table


if __name__ == "__main__":
    main()
