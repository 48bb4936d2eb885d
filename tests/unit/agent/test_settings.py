from pathlib import Path

import pytest

from pretrain_agent.settings import AgentSettings, TrainingProgram, parse_settings

REQUIRED = ["--coordinator", "ws://c", "--job-uid", "u", "--slot", "1", "--attempt", "2"]


def test_a_script_with_arguments_is_the_program() -> None:
    settings = parse_settings([*REQUIRED, "--", "train.py", "--steps", "3", "--"])

    assert settings == AgentSettings(
        coordinator="ws://c",
        job_uid="u",
        slot=1,
        attempt=2,
        program=TrainingProgram("train.py", is_module=False, args=("--steps", "3", "--")),
    )


def test_a_module_is_the_program() -> None:
    settings = parse_settings([*REQUIRED, "--preload", "a", "--preload", "b.c", "--", "-m", "trainer", "x"])

    assert settings.program == TrainingProgram("trainer", is_module=True, args=("x",))
    assert settings.preload == ("a", "b.c")


def test_options_are_read() -> None:
    settings = parse_settings(
        [*REQUIRED, "--run-dir", "/r", "--token-file", "/t", "--ca-file", "/ca", "--grace", "5", "--", "x"]
    )

    assert (settings.run_dir, settings.token_file, settings.grace) == (Path("/r"), Path("/t"), 5.0)
    assert settings.ca_file == Path("/ca")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (REQUIRED, "no training program"),
        ([*REQUIRED, "--", "-m"], "no training program"),
        ([*REQUIRED, "--processes", "0", "--", "x"], "give 1 or more"),
        ([*REQUIRED, "--http-port", "-1", "--", "x"], "give 0 or more"),
        (["--", "x"], "--coordinator is required"),
    ],
)
def test_a_mistake_ends_with_code_2_and_a_sentence(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(argv)

    assert stop.value.code == 2
    assert words in capsys.readouterr().err
