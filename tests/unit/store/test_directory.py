"""The folder as an object store: the contract, and what only a folder can get wrong."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import ConditionalPutUnsupported, ObjectExists, StoreRefused
from pretrain_store.port import ObjectStore
from support.store.contract import StoreContract, keys


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return DirectoryStore(tmp_path_factory.mktemp("store") / "not" / "there" / "yet")


class TestDirectory(StoreContract):
    pass


WRITER = """
import os, sys
from pathlib import Path
from pretrain_store.directory import DirectoryStore
os.mkfifo(sys.argv[2])
DirectoryStore(Path(sys.argv[1])).put_file("key", Path(sys.argv[2]))
"""


def locked(path: Path) -> bool:
    """Tell whether a process writes this file: until it has the lock, the file is litter to others."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_killed_process_leaves_no_object_and_its_litter_is_cleared(tmp_path: Path) -> None:
    root, pipe = tmp_path / "store", tmp_path / "pipe"
    store = DirectoryStore(root)
    store.put("other", b"")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(root), str(pipe)]) as writer:
        try:
            while not pipe.exists():
                assert writer.poll() is None
            with pipe.open("wb", buffering=0) as source:
                source.write(b"half")
                while not any(locked(path) for path in (root / ".tmp").iterdir()):
                    assert writer.poll() is None
                store.clear_litter()
                while_written = list((root / ".tmp").iterdir())
                writer.send_signal(signal.SIGKILL)
                writer.wait()
        finally:
            writer.kill()
    assert len(while_written) == 1
    assert list((root / ".tmp").iterdir()) == while_written
    assert keys(store) == ["other"]

    store.clear_litter()

    assert list((root / ".tmp").iterdir()) == []


def test_folders_among_the_litter_are_left_alone(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for name in "bd":
        (store.scratch / name).mkdir(parents=True)
    for name in "ace":
        (store.scratch / name).write_bytes(b"")

    store.clear_litter()

    assert sorted(path.name for path in store.scratch.iterdir()) == ["b", "d"]
    assert keys(store) == []


def _race(root: Path, number: int, rounds: int, wins: multiprocessing.Queue[tuple[int, int]]) -> None:
    store = DirectoryStore(root)
    for attempt in range(rounds):
        try:
            store.put(f"race/{attempt}", str(number).encode(), if_absent=True)
        except ObjectExists:
            continue
        wins.put((attempt, number))
    wins.put((-1, number))


def test_of_racing_processes_exactly_one_wins_each_key(tmp_path: Path) -> None:
    rounds, racers = 25, 4
    context = multiprocessing.get_context("fork")
    wins = context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, number, rounds, wins)) for number in range(racers)]
    for process in processes:
        process.start()
    told: list[tuple[int, int]] = []
    while sum(attempt == -1 for attempt, _ in told) < racers:
        told.append(wins.get(timeout=60))
    for process in processes:
        process.join()

    winners = sorted(won for won in told if won[0] >= 0)
    assert [attempt for attempt, _ in winners] == list(range(rounds))
    assert all(DirectoryStore(tmp_path).get(f"race/{attempt}") == str(number).encode() for attempt, number in winners)


def test_puts_and_deletes_in_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = DirectoryStore(tmp_path)

    def churn(number: int) -> None:
        for _ in range(50):
            store.put(f"a/b/{number}", b"x", if_absent=True)
            store.delete(f"a/b/{number}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))

    assert keys(store) == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("race", [FileNotFoundError, FileExistsError])
def test_a_folder_that_goes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: type[OSError]
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("other", b"")
    mkdir = Path.mkdir
    races = [race, race]

    def interrupted(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == "folder" and races:
            raise races.pop()
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", interrupted)

    store.put("folder/key", b"data", if_absent=True)

    assert races == []
    assert store.get("folder/key") == b"data"


def test_an_object_cannot_hold_others(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("key", b"")

    with pytest.raises(StoreRefused, match="key"):
        store.put("key/below", b"")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/a", "a/./b"])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        DirectoryStore(tmp_path).put(key, b"")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreRefused, match=r"folder .*file"):
        DirectoryStore(tmp_path / "file").put("key", b"")


def test_a_file_system_without_links_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, path: Path) -> None:
        raise OSError(95, "Operation not supported", str(path))

    monkeypatch.setattr(os, "link", no_links)

    store = DirectoryStore(tmp_path)
    with pytest.raises(ConditionalPutUnsupported, match="no hard links"):
        store.put("key", b"", if_absent=True)
    store.put("key", b"data")
    store.fetch("key", tmp_path.with_name("copy"))
    assert tmp_path.with_name("copy").read_bytes() == b"data"
