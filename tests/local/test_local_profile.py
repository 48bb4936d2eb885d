"""A profile of a local run, asked for by another process while it trains."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
from pathlib import Path

from support.worlds.local import PRETRAIN, Run


def test_a_profile_is_taken_of_a_run_without_a_restart(job: Path, tmp_path: Path) -> None:
    with Run(job, tmp_path / "run", "--set", "training.steps=100000", "--workers", "2", "--tensorboard") as started:
        started.until_line(lambda line: "generation 1" in line and "step" in line)
        asked = [str(PRETRAIN), "profile", str(started.out), "--steps", "2", "--rank", "1"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=200)
        started.process.send_signal(signal.SIGINT)
        finished = started.finish()

    assert told.returncode == 0, told.stderr + finished.explain()
    trace = Path(told.stdout.splitlines()[0])
    assert trace.is_relative_to(started.out / "checkpoints/profiles")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [generation.number for generation in finished.report.generations] == [1]
    assert [profile.location for profile in finished.status.profiles] == [str(trace)]
    (events,) = (started.out / "tensorboard").iterdir()
    assert b"step_seconds/compute" in events.read_bytes()
