"""Adapters on this node's disk: fetched from the store once per node, verified, kept under a byte budget.

Several replicas of a node share the folder, each a process of its own, so the rules are kept by file locks:

    <cache>/adapters/<digest>/        appears by rename, so it is whole or not there
    <cache>/adapters/<digest>.lock    shared: somebody reads the folder; exclusive: somebody makes or removes it

What was not used for longest goes first when the budget is exceeded; what is being read stays.
"""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster import keys, records
from cluster.errors import NotServing, ObjectDamaged
from cluster.records import AdapterRecord
from cluster.store import Store

_RETRY_AFTER_S = 10


@dataclass(frozen=True)
class Download:
    """An adapter's folder; it stays until `close`."""

    folder: Path
    lock: IO[str]

    def close(self) -> None:
        self.lock.close()


class Downloads:
    """The folder of downloaded adapters. `open` blocks: call it from a thread."""

    def __init__(self, folder: Path, store: Store, max_bytes: int) -> None:
        self._folder = folder
        self._store = store
        self._max_bytes = max_bytes

    def open(self, record: AdapterRecord) -> Download:
        """The adapter's folder, downloaded and verified if it is not here.

        Raises ObjectNotFound, ObjectDamaged and other StoreErrors, and NotServing when this node's disk fails; nothing
        half-made is left.
        """
        try:
            return self._opened(record)
        except OSError as error:
            raise NotServing(f"this node cannot keep adapters in {self._folder}: {error}", _RETRY_AFTER_S) from error

    def _opened(self, record: AdapterRecord) -> Download:
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = self._folder / record.digest
        lock = self._lock_file(record.digest).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            while not folder.exists():
                fcntl.flock(lock, fcntl.LOCK_EX)  # another may have come between the two locks, so look again
                if not folder.exists():
                    self._fetch(record, folder)
                fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(folder)
            self._trim()
        except BaseException:
            lock.close()
            raise
        return Download(folder, lock)

    def _fetch(self, record: AdapterRecord, folder: Path) -> None:
        files = [file for file in record.files if file.file.startswith("adapter_")]
        if records.digest_of(files) != record.digest:
            raise ObjectDamaged(f"the record of {record.name}@{record.version} lists files of another digest")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            records.fetch_files(self._store, keys.adapter_version_prefix(record.name, record.version), files, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _trim(self) -> None:
        """Remove the longest unused folders until the rest fits the budget."""
        found = []
        for folder in self._folder.iterdir():
            if folder.suffix not in (".lock", ".partial") and folder.is_dir():
                try:
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    found.append((folder.stat().st_mtime_ns, size, folder))
                except FileNotFoundError:
                    continue  # another replica removed it meanwhile
        total = sum(size for _, size, _ in found)
        for _, size, folder in sorted(found):
            if total <= self._max_bytes:
                return
            with self._lock_file(folder.name).open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # being read, here or by another replica
                shutil.rmtree(folder, ignore_errors=True)
                total -= size

    def _lock_file(self, digest: str) -> Path:
        return self._folder / f"{digest}.lock"
