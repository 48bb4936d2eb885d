"""What a whole run says of its model on the way: validation losses, an evaluation of the user's own, texts."""

from __future__ import annotations

from pathlib import Path

from pretrain_api.status.records import EvaluationRecord, SampleRecord
from pretrain_cli.render.report import read_lines
from support.worlds.local import run, write_job

HOOK = """
def endings(trained):
    if trained.step == 8:
        raise ValueError("not today")
    loss, = trained.losses([[1, 2, 3]])
    return {"ending": loss, "ranks": trained.world_size}
"""


def test_everything_is_in_its_file_the_report_and_the_lines(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    (tmp_path / "mine.py").write_text(HOOK)
    evaluation = "{every: 4, sequences: 4, sources: [{name: words, uri: words}], hook: mine.py:endings}"
    sampling = '{every: 6, tokens: 8, prompts: ["the ", "1 "]}'

    finished = run(
        job, tmp_path / "out", "--workers", "2", "--set", "training.steps=12",
        "--set", f"training.evaluation={evaluation}", "--set", f"training.sampling={sampling}",
    )  # fmt: skip

    assert finished.code == 0, finished.explain()
    evaluations = read_lines(finished.out / "evaluations.jsonl", EvaluationRecord)
    assert [record.step for record in evaluations] == [4, 8, 12]
    assert [sorted(record.metrics) for record in evaluations] == [["ending", "ranks"], [], ["ending", "ranks"]]
    assert evaluations[1].problem == "ValueError: not today"
    assert all(0 < record.losses["words"] < 7 for record in evaluations)
    samples = read_lines(finished.out / "samples.jsonl", SampleRecord)
    assert [(record.step, record.number, record.prompt) for record in samples] == [
        (6, 0, "the "), (6, 1, "1 "), (12, 0, "the "), (12, 1, "1 "),
    ]  # fmt: skip

    assert finished.report.evaluation_metrics == evaluations[-1].metrics == finished.status.evaluation_metrics
    assert finished.report.validation_loss == evaluations[-1].losses
    assert finished.status.sample == "\n\n".join(record.prompt + record.text for record in samples[-2:])
    page = (finished.out / "report.html").read_text()
    assert page.count("After step") == 4
    assert '<th class="n">ending</th>' in page
    for said in (
        "evaluation after step 4: words ",
        "WARNING EvaluationHookFailed: step 8: ValueError: not today; training continues",
        "sample after step 12: the ",
        "evaluation   ending ",
    ):
        assert said in finished.stdout
