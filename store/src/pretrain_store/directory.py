"""A folder as an object store: for local runs, and for volumes that many pods share.

Every object is written to a temporary file in `.tmp/`, synced, and then linked (conditional) or renamed (unconditional)
to its name: both are atomic, and a link to a name that is taken fails. A temporary file is locked while it is written,
so that files of killed processes can be told from files being written, without a clock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_store.digest import Digest, digested, read_into
from pretrain_store.errors import (
    ConditionalPutUnsupported,
    ObjectExists,
    ObjectNotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from pretrain_store.port import MultipartUpload, ObjectInfo

_TEMPORARY = ".tmp"
_ATTEMPTS = 100
"""Attempts to put an object in a folder that other processes remove when it is empty; each removal costs one."""
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DirectoryStore:
    """An ObjectStore in a folder, which the first put creates."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """See ObjectStore. Raises ConditionalPutUnsupported where the file system has no hard links."""
        place = _link if if_absent else os.replace
        with self._translated(key), self._temporary() as (file, path):
            file.write(data)
            _sync(file)
            self._put_in_place(path, key, place)

    def put_file(self, key: str, path: Path) -> StoredObject:
        """See ObjectStore."""
        with path.open("rb", buffering=0) as source, self._translated(key), self._temporary() as (file, written):
            digest = digested(source, file.write)
            _sync(file)
            self._put_in_place(written, key, os.replace)
        return StoredObject(key=key, size=digest.size, sha256=digest.sha256)

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        path = self._path(key)
        with self._translated(key):
            try:
                return path.read_bytes()
            except _ABSENT:
                raise ObjectNotFound(key) from None

    def fetch(self, key: str, path: Path) -> None:
        """See ObjectStore. The file is a hard link to the object where that is possible."""
        source = self._path(key)
        with self._translated(key):
            if not source.is_file():
                raise ObjectNotFound(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            try:
                _link_or_copy(source, partial)
                os.replace(partial, path)
            except FileNotFoundError:
                raise ObjectNotFound(key) from None
            finally:
                partial.unlink(missing_ok=True)

    def receive(self, key: str, into: memoryview) -> Digest:
        """See ObjectStore."""
        path = self._path(key)
        with self._translated(key):
            try:
                with path.open("rb", buffering=0) as source:
                    return read_into(source, into)
            except _ABSENT:
                raise ObjectNotFound(key) from None

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """See ObjectStore."""
        folder = prefix.rpartition("/")[0]
        with self._translated(prefix):
            found = self._walk(self._path(folder) if folder else self._root, f"{folder}/" if folder else "")
            return tuple(sorted((item for item in found if item.key.startswith(prefix)), key=lambda item: item.key))

    def delete(self, key: str) -> None:
        """See ObjectStore. Folders that become empty are removed as well."""
        path = self._path(key)
        with self._translated(key):
            try:
                path.unlink()
            except _ABSENT:
                return
            for folder in path.parents:
                _sync_folder(folder)
                if folder == self._root or not _removed(folder):
                    return

    def list_uploads(self, prefix: str) -> tuple[MultipartUpload, ...]:
        """See ObjectStore. A folder has none: files are written whole."""
        return ()

    def abort(self, upload: MultipartUpload) -> None:
        """See ObjectStore."""

    def describe(self) -> str:
        """See ObjectStore."""
        return f"folder {self._root}"

    @property
    def scratch(self) -> Path:
        """A folder outside all listings, into which objects are fetched as links instead of copies."""
        return self._root / _TEMPORARY

    def clear_litter(self) -> None:
        """Remove temporary files of dead processes; those being written are locked and stay. Folders are left alone."""
        with suppress(OSError):
            for path in (self._root / _TEMPORARY).iterdir():
                _remove_if_abandoned(path)

    @contextmanager
    def _temporary(self) -> Generator[tuple[BinaryIO, Path]]:
        """Make a new locked file, and remove it afterwards if it is still there."""
        folder = self._root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / uuid.uuid4().hex
            with path.open("xb") as file:
                with suppress(OSError):  # without locks nothing in the file system is recognised as litter
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue  # taken for litter between open and lock
                try:
                    yield file, path
                finally:
                    path.unlink(missing_ok=True)
                return

    def _put_in_place(self, written: Path, key: str, place: Callable[[Path, Path], None]) -> None:
        path = self._path(key)
        for _ in range(_ATTEMPTS):
            try:
                _make_folder(path.parent, self._root)
                place(written, path)
                _sync_folder(path.parent)
            except FileNotFoundError:
                continue
            except FileExistsError:
                raise ObjectExists(key) from None
            return
        raise StoreUnavailable(f"{self.describe()}: the folder of {key} is removed again and again")

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except _ABSENT:
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if prefix or entry.name != _TEMPORARY:
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            with suppress(FileNotFoundError):
                yield ObjectInfo(f"{prefix}{entry.name}", entry.stat().st_size)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or parts[0] == _TEMPORARY or "\0" in key:
            raise ValueError(f"not a key: {key!r}")
        return self._root.joinpath(*parts)

    @contextmanager
    def _translated(self, key: str) -> Generator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            kind = StoreRefused if error.errno in _REFUSED else StoreUnavailable
            raise kind(f"{self.describe()}: {key}: {error.strerror or error}") from error


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise ConditionalPutUnsupported(
                f"the file system of {path.parent} has no hard links: choose another folder"
            ) from error
        raise


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, path)


def _make_folder(folder: Path, root: Path) -> None:
    """Make a folder of the store and sync its changed parents: a crash must not lose a committed manifest."""
    missing = [path for path in (folder, *folder.parents) if path.is_relative_to(root) and not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if folder.is_file():
            raise StoreRefused(f"{folder} is an object and cannot hold others") from None
        raise FileNotFoundError(folder) from None  # another process removed it, and by now may have made it again
    for path in missing:
        _sync_folder(path.parent)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # not empty, or another process was faster
        return False
    return True


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(FileNotFoundError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _remove_if_abandoned(path: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError, IsADirectoryError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
