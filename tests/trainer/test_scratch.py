"""Files on their way to the store leave nothing behind, even when their process is killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from pretrain_sdk.scratch import Scratch, remove_abandoned


def test_a_folder_is_gone_after_its_use(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        (scratch.path / "file").write_bytes(b"content")

    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    try:
        assert mine.poll(60)
        held = Path(mine.recv())
        remove_abandoned(tmp_path)
        assert held.exists()
    finally:
        process.kill()
        process.join()

    with Scratch(tmp_path) as own:
        remove_abandoned(tmp_path)
        assert list(tmp_path.iterdir()) == [own.path]


def _hold(folder: Path, pipe: Connection) -> None:
    scratch = Scratch(folder)
    (scratch.path / "file").write_bytes(b"content")
    pipe.send(str(scratch.path))
    pipe.poll(60)


def test_what_does_not_fit_in_memory_goes_to_tmpdir(tmp_path: Path) -> None:
    with Scratch.with_room(1 << 60, {"TMPDIR": str(tmp_path)}) as scratch:
        assert scratch.path.parent == tmp_path


def test_a_folder_beside_something_is_made_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with Scratch.beside(tmp_path / "not" / "there") or Scratch(tmp_path) as scratch:
        assert scratch.path.parent == tmp_path / "not" / "there"
    assert Scratch.beside(tmp_path / "file") is None
