"""The environment of a process, parsed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain_trainer.core.environment import Environment


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    environment = Environment.of({"HOME": "/home/user"})

    assert (environment.rank, environment.world_size, environment.rendezvous) == (0, 1, False)
    assert (environment.local_rank, environment.local_world_size) == (0, 1)
    assert environment.user_cache == Path("/home/user/.cache")
    assert environment.logs is None


def test_the_variables_of_torchrun_and_of_the_user_are_read() -> None:
    variables = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
        "HOME": "/home/user", "XDG_CACHE_HOME": "/cache", "TMPDIR": "/scratch",
    }  # fmt: skip

    environment = Environment.of(variables)

    assert (environment.rank, environment.world_size, environment.rendezvous) == (5, 8, True)
    assert (environment.local_rank, environment.local_world_size) == (1, 4)
    assert (environment.user_cache, environment.scratch) == (Path("/cache"), Path("/scratch"))
    assert environment.variables is variables


def test_a_rank_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Environment.of({"RANK": "first"})
