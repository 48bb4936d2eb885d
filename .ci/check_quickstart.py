"""The quickstart's promises, read from what it left: python .ci/check_quickstart.py RUN_DIR."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
report = json.loads((run / "report.json").read_text())
failed = [
    promise
    for promise, kept in {
        "the run succeeded": report["result"] == "Succeeded",
        "it had one incident, the killed worker": [i["cause"] for i in report["incidents"]] == ["WorkerLost"],
        "it went on after it": all(i["resumedSeconds"] is not None for i in report["incidents"]),
        "workers went 3 -> 2 -> 3": [g["workers"] for g in report["generations"]] == [3, 2, 3],
        "the loss is well below the unigram model's": report["finalLoss"] < report["unigramLoss"] - 1.0,
        "it took less than three minutes": report["wallSeconds"] < 180,
        "its files are there": all((run / name).exists() for name in ("metrics.jsonl", "loss.png", "report.html")),
    }.items()
    if not kept
]
print(json.dumps({key: report[key] for key in ("finalLoss", "unigramLoss", "wallSeconds", "incidents")}, indent=1))
if failed:
    sys.exit("\n".join(f"quickstart: it is not true that {promise}" for promise in failed))
