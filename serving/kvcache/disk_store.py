"""The folder of a disk pool: which process owns it, and what made the KV in it.

Processes may share a parent folder. Each owns a folder of its own there, and holds the folder's lock as long as it
runs; the system frees the lock when a process ends, however it does. `store.json` says what made the KV. A process that
starts takes over a folder without an owner whose KV it would have made itself, or creates one.

Folders are looked for, taken over, created and removed under the parent's lock, so processes that start together do
not meet. Owners never take that lock again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tenure.checked import Count, Positive, Range, verify

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)
PREFIX, PARENT_LOCK, LOCK, DESCRIPTION = "tenure-kv-", "tenure-kv.lock", "in-use.lock", "store.json"
STORE_SCHEMA = 1


@dataclass(frozen=True)
class DiskConfig:
    """Sizes and times of a `DiskPool`.

    Attributes:
        block_tokens: tokens that are read and verified together; a part of a file is read in whole blocks.
        label_bytes: room in a file for its namespace, its agents and the fingerprint; with a longer label, a file is
            of no use after a restart.
        max_header_bytes: a file that claims a longer header is not read.
        stale_s: seconds after which KV of another origin is removed if no process has used it.
        claim_timeout_s: seconds to wait for another process that is starting.

    Raises:
        ValueError: a number that is not above 0, or less than 256 bytes for the label.
    """

    block_tokens: Count = 64
    label_bytes: Annotated[int, Range(256)] = 1024
    max_header_bytes: Count = 2**24
    stale_s: Positive = 14 * 86400.0
    claim_timeout_s: Positive = 30.0

    def __post_init__(self) -> None:
        verify(self)


class DiskStore:
    """A folder that this process owns until `release` or `remove`.

    Attributes:
        path: the folder.
        fingerprint: digest of what makes the KV, see `digest_of`; None: unknown, so nobody else can use the files.
    """

    def __init__(self, path: Path, lock: BaseFileLock, fingerprint: str | None) -> None:
        self.path, self._lock, self.fingerprint = path, lock, fingerprint

    def describe(self, fingerprint: str | None) -> None:
        """KV is made by `fingerprint` from now on. The description only saves others from looking into the files, each
        of which names what made it; so a failure to write it is not one of the cache."""
        self.fingerprint = fingerprint
        content = json.dumps({"schema": STORE_SCHEMA, "fingerprint": fingerprint})
        temporary = self.path / f".{DESCRIPTION}.tmp"
        try:
            temporary.write_text(content)
            os.replace(temporary, self.path / DESCRIPTION)
        except OSError as error:
            logger.warning("%s cannot be described: %s", self.path, error)

    def release(self) -> None:
        """The folder stays, for the next process that can use it."""
        with contextlib.suppress(OSError):
            os.utime(self.path / DESCRIPTION)
        self._lock.release()

    def remove(self) -> None:
        """Removes the folder with all that is in it, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def digest_of(fingerprint: str | None) -> str | None:
    """A fixed-length name of a fingerprint."""
    return None if fingerprint is None else hashlib.sha256(fingerprint.encode()).hexdigest()


def open_store(parent: Path, fingerprint: str | None, capacity: int, config: DiskConfig) -> DiskStore:
    """Takes over the folder of this fingerprint that was used last among those without an owner, or creates one.

    Folders without an owner are removed if nobody can use them (no fingerprint, no readable description) or if they are
    stale. Others are removed, the oldest first, if `fingerprint` is given and the file system has less free space than
    the pool may still need.

    Raises:
        OSError: `parent` cannot be created or written to.
    """
    from filelock import Timeout

    parent.mkdir(parents=True, exist_ok=True)
    lock = _file_lock(parent / PARENT_LOCK)
    try:
        lock.acquire(timeout=config.claim_timeout_s)
    except Timeout:
        logger.warning("another process has been starting on %s for %s s", parent, config.claim_timeout_s)
        return create_store(parent, fingerprint)
    try:
        return _claim(parent, fingerprint, capacity, config) or create_store(parent, fingerprint)
    finally:
        lock.release()


def create_store(parent: Path, fingerprint: str | None) -> DiskStore:
    """Creates a folder of this process; raises OSError if that is not possible."""
    from filelock import Timeout

    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        lock = _file_lock(path / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # a process took the folder for an abandoned one before it was locked
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        store = DiskStore(path, lock, fingerprint)
        store.describe(fingerprint)
        return store


def _claim(parent: Path, fingerprint: str | None, capacity: int, config: DiskConfig) -> DiskStore | None:
    """Locks the folders without an owner, removes what is not kept, and keeps the lock of the one to use."""
    unowned: list[tuple[float, DiskStore]] = []
    for path in parent.glob(f"{PREFIX}*"):
        lock = _try_lock(path) if path.is_dir() and not path.is_symlink() else None
        if lock is None:
            continue
        known, found = _read_description(path)
        store = DiskStore(path, lock, found)
        if known and time.time() - _last_use(path) <= config.stale_s:
            unowned.append((_last_use(path), store))
        else:
            store.remove()
    unowned.sort(key=lambda each: each[0])
    own = [store for _, store in unowned if fingerprint is not None and store.fingerprint == fingerprint]
    chosen = own[-1] if own else None
    others = [store for _, store in unowned if store is not chosen]
    used = 0 if chosen is None else _size(chosen.path)
    for store in others:
        # A pool without a fingerprint may still be bound to one of these.
        if fingerprint is not None and shutil.disk_usage(parent).free < capacity - used:
            store.remove()
        else:
            store._lock.release()
    return chosen


def _read_description(path: Path) -> tuple[bool, str | None]:
    """Whether some process can use the folder, and the fingerprint if it is one of this schema."""
    try:
        content: Any = json.loads((path / DESCRIPTION).read_bytes())
        schema, fingerprint = content["schema"], content["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False, None
    if schema != STORE_SCHEMA:
        return True, None  # of another version, for which it is kept
    return isinstance(fingerprint, str), fingerprint


def _last_use(path: Path) -> float:
    """Seconds since the epoch of the folder's last change."""
    times = [0.0]
    for each in (path, path / DESCRIPTION):
        with contextlib.suppress(OSError):
            times.append(each.stat().st_mtime)
    return max(times)


def _size(path: Path) -> int:
    total = 0
    for each in path.iterdir():
        with contextlib.suppress(OSError):
            total += each.stat().st_size
    return total


def _try_lock(path: Path) -> BaseFileLock | None:
    """The folder's lock if nobody holds it."""
    from filelock import Timeout

    lock = _file_lock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return None  # in use, or being removed
    return lock


def _file_lock(path: Path) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, thread_local=False)  # another thread may close the pool
