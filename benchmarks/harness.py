"""Shared parts of the benchmarks: machine, quickstart job, and our trainer under plain torchrun."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "examples" / "quickstart.yaml"


def machine() -> dict[str, object]:
    """Describe the machine of a measurement."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memoryGiB": round(psutil.virtual_memory().total / 2**30),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": version("torch"),
        "command": " ".join(sys.argv),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def prepare_corpus() -> None:
    """Build the quickstart's corpus if it is missing."""
    subprocess.run([sys.executable, "-m", "tools.corpus", "examples/data"], cwd=ROOT, check=True)


def pretrain_run(out: Path, *options: str) -> tuple[dict, list[dict]]:
    """Run the quickstart's job with `pretrain run`; return the report and the lines of metrics.jsonl."""
    command = [str(Path(sys.executable).parent / "pretrain"), "run", str(JOB), "--out", str(out), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    report = json.loads((out / "report.json").read_text())
    return report, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Torchrun:
    """Plain `torchrun` of our trainer on one node; rank 0 prints its reports as JSON lines."""

    config: Path
    options: tuple[str, ...]
    on_step: Callable[[float, dict], None]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.process = subprocess.Popen(
            [*command, "-m", "pretrain_trainer", str(self.config)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"kind":"step"'):
                self.on_step(time.time(), json.loads(line))

    @property
    def running(self) -> bool:
        """True until the launcher exits."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL the launcher and its ranks, like the loss of a node."""
        if not self.running:
            return
        tree = psutil.Process(self.process.pid)
        for process in [tree, *tree.children(recursive=True)]:
            process.kill()
        self.process.wait()


def trainer_config(folder: Path, run_config: Path, **changes: object) -> Path:
    """Write the configuration of a `pretrain run` with changes: same model and data, own checkpoints."""
    config = json.loads(run_config.read_text())
    config["checkpoint"]["storage"] = {"path": str(folder / "checkpoints")}
    config["checkpoint"]["interval"] = changes.pop("interval")
    config["training"].update(changes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer.json"
    path.write_text(json.dumps(config))
    return path
