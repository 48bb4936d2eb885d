"""The learning rate by step."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from pydantic import ValidationError
from typer.testing import CliRunner

from pretrain_api.spec.schedule import LearningRates
from pretrain_api.spec.training import Training
from pretrain_cli.app import main
from pretrain_cli.render.figure import CURVE
from support.worlds.bad_jobs import with_changes

FIELDS = {
    "model": {"preset": "gpt2-tiny"},
    "data": {"tokenizer": "t", "sources": [{"name": "a", "uri": "a"}]},
    "batch": {"sequences": 10, "microBatch": 2},
    "optimizer": {"learningRate": 1.0},
}
STEP_TOKENS = 320


def rates(total: int, **fields: object) -> list[float]:
    found = LearningRates.of(Training.model_validate(FIELDS | {"steps": total, "schedule": fields}))
    return [found.at(step) for step in range(1, total + 1)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert rates(20, kind="constant", warmupSteps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(kind: str) -> None:
    found = rates(50, kind=kind, warmupSteps=5, minRatio=0.2)

    assert found[-1] == pytest.approx(0.2)
    assert min(found[5:]) == found[-1]
    assert found[4] == 1.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates(100, kind="cosine", warmupSteps=0, minRatio=0.1)[49] == pytest.approx(0.55)


def test_linear_falls_by_equal_amounts() -> None:
    assert rates(4, kind="linear", minRatio=0.0) == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_wsd_is_stable_until_the_last_decay() -> None:
    found = rates(20, kind="wsd", warmupSteps=2, minRatio=0.0, decaySteps=4)

    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_lengths_in_tokens_are_those_in_steps() -> None:
    in_steps = rates(20, kind="wsd", warmupSteps=5, decaySteps=4)

    assert rates(20, kind="wsd", warmupTokens=5 * STEP_TOKENS, decayTokens=4 * STEP_TOKENS) == in_steps
    assert rates(20, kind="wsd", warmupTokens="1.6K", decaySteps=4) == in_steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_length_in_tokens_may_end_within_a_step(kind: str) -> None:
    found = rates(10, kind=kind, warmupTokens=int(2.5 * STEP_TOKENS), minRatio=0.0)

    assert found[:2] == pytest.approx([0.4, 0.8])
    assert found[2] <= 1.0
    assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"warmupSteps": 11}, r"schedule.warmupSteps \(11\) is more than all steps \(10\)"),
        ({"warmupTokens": "3.5K"}, r"schedule.warmupTokens \(10.9375 steps\) is more than all steps \(10\)"),
        (
            {"kind": "wsd", "warmupSteps": 8, "decayTokens": 3 * STEP_TOKENS},
            r"schedule.warmupSteps \+ schedule.decayTokens \(8 \+ 3 steps\) is more than all steps \(10\)",
        ),
    ],
)
def test_what_is_longer_than_the_run_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rates(10, **fields)


def test_tokens_make_steps_rounded_up() -> None:
    assert LearningRates.of(Training.model_validate(FIELDS | {"tokens": 3201})).total == 11
    assert LearningRates.of(Training.model_validate(FIELDS | {"steps": 7})).total == 7


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_command_prints_a_table_and_draws_the_curve(kind: str, tmp_path: Path) -> None:
    file, plot = tmp_path / "job.yaml", tmp_path / "plot.png"
    file.write_text(json.dumps(with_changes({"spec.training.schedule": {"kind": kind, "warmupTokens": "20K"}})))

    ended = CliRunner().invoke(main, ["schedule", str(file), "--out", str(plot), "--set", "training.steps=1000"])

    assert ended.exit_code == 0, ended.output
    rows = [
        line.split() for line in ended.stdout.splitlines() if line.rstrip().endswith(("warm-up", "stable", "decay"))
    ]
    assert [row[0] for row in rows][:3] == ["1", "10", "100"]  # 20K tokens end within the tenth step
    assert rows[-1][:2] == ["1,000", "2,048,000"]
    assert rows[-1][4] == ("100.0%" if kind == "constant" else "10.0%")
    pixels = imread(plot)[:, :, :3]
    near = (abs(pixels - [int(CURVE[i : i + 2], 16) / 255 for i in (1, 3, 5)]) < 0.06).all(axis=2)
    assert near.any(axis=0).sum() > 0.7 * pixels.shape[1]


def test_a_bad_job_is_told(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(with_changes({"spec.training.schedule": {"kind": "round"}})))

    ended = CliRunner().invoke(main, ["schedule", str(file), "--out", str(tmp_path / "plot.png")])

    assert ended.exit_code == 2
    assert "spec.training.schedule.kind" in ended.stderr
    assert not (tmp_path / "plot.png").exists()
