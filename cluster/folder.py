"""A store in a folder: one file per object, for a laptop, tests and shared disks.

Every write goes to a temporary file beside its target and is moved into place whole, so a reader, or a crash, never
sees half an object. `create` moves by a hard link, which fails when the name is taken: atomic between
processes, and between machines on a file system that they share.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import file_digest
from mmap import mmap
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from cluster.errors import (
    ObjectDamaged,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
    StoreUnreachable,
)
from cluster.objects import TEMPORARY, ObjectInfo, check_key

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderStore:
    """The objects below `root`, which is made when the store is opened, and never again."""

    def __init__(self, root: Path, is_new: bool = True) -> None:
        """Raises StoreDenied without the right to make `root`, StoreUnreachable if it cannot be a folder.

        Args:
            is_new: make it, if it is not there.
        """
        self._root = root.absolute()
        self.url = self._root.as_uri()
        if not is_new:
            return
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            kind = StoreDenied if error.errno in _DENIED else StoreUnreachable
            raise kind(
                f"the store's folder {self._root} cannot be made: {error.strerror}; "
                "correct `store:` or make the folder with the right owner"
            ) from error

    def __reduce__(self) -> tuple[type["FolderStore"], tuple[Path, bool]]:
        return FolderStore, (self._root, False)

    def impatient(self) -> "FolderStore":
        return self

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors_named("create", key):
            with self._temporary(path) as (file, temporary):
                file.write(data)
                _flush(file)
                self._link(temporary, path, key)
            _flush_folder(path.parent)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors_named("write", key):
            with self._temporary(path) as (file, temporary):
                file.write(data)
                _flush(file)
                temporary.replace(path)
            _flush_folder(path.parent)

    def get(self, key: str) -> bytes:
        with self._errors_named("read", key):
            return self._path(key).read_bytes()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        with self._errors_named("list", prefix):
            self._check_root()
            yield from _walk(self._root / folder, f"{folder}/" if folder else "", prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors_named("delete", key):
            if path.is_file():
                path.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        with self._errors_named("look for", key):
            if self._path(key).is_file():
                return True
            self._check_root()
            return False

    def upload(self, source: Path | mmap, key: str) -> None:
        target = self._path(key)
        opened = nullcontext(source) if isinstance(source, mmap) else source.open("rb")
        with opened as data, self._errors_named("write", key):
            with self._temporary(target) as (file, temporary):
                if isinstance(data, mmap):
                    _write(data, file)
                else:
                    _copy(data, file, f"{self.url}/{key}")
                _flush(file)
                temporary.replace(target)
            _flush_folder(target.parent)

    def download(self, key: str, path: Path) -> str:
        with self._errors_named("read", key):
            source = self._path(key).open("rb")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{uuid4().hex}")
        try:
            with source, temporary.open("x+b") as file:
                _copy(source, file, f"{self.url}/{key}")
                file.seek(0)
                digest = file_digest(file, "sha256").hexdigest()
            temporary.replace(path)
            return digest
        finally:
            temporary.unlink(missing_ok=True)

    def _check_root(self) -> None:
        """A folder that has gone since (a disk that is not mounted any more) is an outage, and not made again."""
        if not self._root.is_dir():
            raise StoreUnreachable(f"the store's folder {self._root} is not there any more; is its disk mounted?")

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[tuple[BinaryIO, Path]]:
        """An open file beside `target` and its path; whatever happens, nothing of that name is left."""
        self._check_root()
        _make_folders(target.parent)
        temporary = target.with_name(f"{TEMPORARY}{uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                yield file, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path, key: str) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
            raise ObjectExists(f"{self.url}/{key} is already there") from None
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StoreUnfit(
                    f"the file system of {self._root} has no hard links ({error.strerror}), so create-if-absent would "
                    "not be atomic; use a folder on a local disk or NFS, or an s3:// store"
                ) from error
            raise

    @contextmanager
    def _errors_named(self, doing: str, key: str) -> Iterator[None]:
        """Turn the operating system's errors into the store's."""
        try:
            yield
        except FileNotFoundError as error:
            self._check_root()
            raise ObjectNotFound(f"{self.url}/{key} does not exist") from error
        except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
            # On a disk `a` cannot be a file and a folder; on S3 it can. Keys must not rely on that.
            if doing in ("read", "look for", "list"):
                raise ObjectNotFound(f"{self.url}/{key} does not exist") from error
            raise StoreError(
                f"cannot {doing} {self.url}/{key}: {error.filename} is an object where a folder is needed, or a folder "
                "where an object is; one key must not be the beginning of another"
            ) from error
        except OSError as error:
            if error.errno in _DENIED:
                raise StoreDenied(
                    f"no right to {doing} {key!r} in the store's folder {self._root}: {error.strerror} "
                    f"({error.filename}); give user {os.getuid()} the right to it, or correct `store:`"
                ) from error
            raise StoreError(f"cannot {doing} {self.url}/{key}: {error.strerror} (errno {error.errno})") from error


def _walk(folder: Path, above: str, prefix: str) -> Iterator[ObjectInfo]:
    """The objects below `folder`, whose own key is `above`, in key order.

    A folder is sorted as its name with the `/` that follows it in every key below: `a-b` < `a/b` < `a0`.
    """
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    folders = {entry.name for entry in entries if entry.is_dir()}
    for name in sorted(entry.name + "/" * (entry.name in folders) for entry in entries):
        key = above + name
        if name.startswith(TEMPORARY):
            continue
        if name.endswith("/"):
            if key.startswith(prefix) or prefix.startswith(key):
                yield from _walk(folder / name, key, prefix)
        elif key.startswith(prefix):
            try:
                size = (folder / name).stat().st_size
            except FileNotFoundError:  # deleted since the folder was read
                continue
            yield ObjectInfo(key, size)


def _copy(source: BinaryIO, target: BinaryIO, what: str) -> None:
    expected = os.fstat(source.fileno()).st_size
    shutil.copyfileobj(source, target, 1 << 20)
    if target.tell() != expected:
        raise ObjectDamaged(f"{what} came out with {target.tell()} bytes of {expected}; did the file change?")


def _write(source: mmap, target: BinaryIO) -> None:
    with memoryview(source) as view:  # released at once: an mmap that a view looks into cannot be closed
        target.write(view)


def _make_folders(folder: Path) -> None:
    """Make `folder` so that it survives a power cut: a folder's own name is data of the folder above."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
