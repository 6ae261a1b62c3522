"""The disk tier: one file a node, verified when it is read; an unreadable file is a cache miss.

Files are written layer by layer under a temporary name, then renamed. Nothing is synced to the device: a process that
is killed loses only unfinished files; a machine that loses power may lose or damage finished ones, which the digests
detect when they are read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import KVPayload, LostPayloadError, PromptKey
from .disk_store import DiskConfig, create_store, digest_of, open_store
from .memory_pool import Pool
from .prompt_file import (
    DIGEST_BYTES,
    ID_BYTES,
    FileLayout,
    FilePayload,
    PromptFile,
    index_of,
    new_layout,
    pack_layer,
    read_index,
    type_code,
)

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)
SUFFIX, TEMPORARY_SUFFIX = ".kv", ".tmp"


class DiskPool(Pool):
    """Files in a folder.

    With a fingerprint, the files outlive the pool, and the process: the next pool of the same fingerprint on that
    folder finds them (`restored`). Without one, they are removed when the pool is closed. The folder of a pool is made
    again if it is removed meanwhile: what was in it is a miss.

    Bytes that could not be freed (a file that cannot be removed, a file of which only the end is needed) are not
    available; removing is tried again whenever room is needed.

    `new_builder`, `discard` and what reads counts are called under the cache's lock; builders run on worker threads.

    Args:
        capacity: bytes of all files together, indexes included.
        folder: created if it does not exist; may be shared with other processes, each of which has a folder in it.
        fingerprint: names everything that makes the KV: weights, adapter, gates, policy, budget, dtype, tokenizer,
            template. KV of another fingerprint is never read.
        config: sizes and times.

    Raises:
        ValueError: a negative capacity, or an empty fingerprint.
        OSError: the folder cannot be created.
    """

    def __init__(
        self, capacity: int, folder: str | os.PathLike, fingerprint: str | None = None, config: DiskConfig | None = None
    ) -> None:
        super().__init__(capacity)
        _check(fingerprint)
        self.config, self._parent = config or DiskConfig(), Path(folder)
        self._store = open_store(self._parent, digest_of(fingerprint), capacity, self.config)
        self._numbers = count(self._first_number())
        self._used = False  # files were written or restored
        self._closed = False
        self._changing = threading.Lock()  # guards `_store` and `_stuck`, which builders change as well
        self._stuck: dict[Path, int] = {}  # files to remove, with their bytes
        self._slack: dict[Path, int] = {}  # files of which less is needed than there is, and the bytes of the rest

    @property
    def folder(self) -> Path:
        """The pool's own folder; another one after it was removed."""
        return self._store.path

    @property
    def persistent(self) -> bool:
        return self._store.fingerprint is not None

    @property
    def available(self) -> int:
        with self._changing:
            return self.capacity - self.used - sum(self._stuck.values()) - sum(self._slack.values())

    def bind(self, fingerprint: str | None) -> None:
        """Names what makes the KV, once that is known; None: files do not outlive the pool.

        To be called before anything is stored: the pool takes over the files of that fingerprint that another process
        has left (`TieredCache.restore_disk`).

        Raises:
            ValueError: an empty fingerprint; files of another one were restored or written.
        """
        _check(fingerprint)
        if digest_of(fingerprint) == self._store.fingerprint:
            return
        if self._used:
            raise ValueError(
                f"got the fingerprint {fingerprint!r:.80} for a disk pool that is used with another one; accepted: a "
                "pool without a fingerprint that nothing was stored in, or TieredCache.flush for new weights"
            )
        with self._changing:
            self._leave()
            self._store = open_store(self._parent, digest_of(fingerprint), self.capacity, self.config)
            self._numbers = count(self._first_number())

    def rebind(self, fingerprint: str | None) -> None:
        """Take over the fingerprint of other weights. The files there are remain readable for whoever holds their
        payloads, who also discards them, and are never found again; for `TieredCache.flush`.

        Raises:
            ValueError: an empty fingerprint.
        """
        _check(fingerprint)
        with self._changing:
            if digest_of(fingerprint) != self._store.fingerprint:
                self._store.describe(digest_of(fingerprint))

    def restored(self) -> list[tuple[PromptKey, FilePayload, float]]:
        """The payloads that other processes have left, the one used last first, with the time of their last use.

        The payloads are the caller's, which stores or discards each; times are seconds since the epoch. What is not
        usable in the folder is removed. Empty after the first call.
        """
        fingerprint = self._store.fingerprint
        if self._used or fingerprint is None:
            return []
        self._used = True
        found, lost = [], 0
        for path in sorted(self.folder.iterdir(), key=_number, reverse=True):
            if path.suffix == TEMPORARY_SUFFIX:
                self._remove(path, 0)
            elif path.suffix == SUFFIX:
                try:
                    file, prompt = read_index(path, fingerprint, self.config.max_header_bytes)
                    last_use = path.stat().st_mtime
                    os.truncate(path, file.needed_bytes)  # a part of a block is of no use
                    found.append((prompt, FilePayload(file, *file.live[0]), last_use))
                except (LostPayloadError, OSError) as error:
                    logger.debug("not restored: %s", error)
                    lost += 1
                    self._remove(path, _size(path))
        if lost:
            logger.warning("%d of %d files in %s are not usable and were removed", lost, lost + len(found), self.folder)
        return sorted(found, key=lambda each: each[2], reverse=True)

    def _first_number(self) -> int:
        """Above those of the files in the folder."""
        return 1 + max(map(_number, self.folder.glob(f"*{SUFFIX}")), default=-1)

    # Sizes --------------------------------------------------------------------------------------------------------

    def validate(self, payload: KVPayload) -> None:
        for dtype, _ in payload.kinds().values():
            type_code(dtype)

    def charge(self, payload: KVPayload) -> int:
        if isinstance(payload, FilePayload):
            return payload.file.share(payload.start, payload.stop)
        layout = self._layout(payload, 0)
        return layout.size(layout.rows)

    def prompt_bytes(self, tokens: int) -> int:
        return ID_BYTES * tokens if self.persistent else 0

    def _layout(self, payload: KVPayload, prompt_tokens: int) -> FileLayout:
        return new_layout(payload, prompt_tokens, self.config.block_tokens, self.config.label_bytes)

    # Files --------------------------------------------------------------------------------------------------------

    def new_builder(self, payload: KVPayload, prompt: PromptKey | None = None) -> FileBuilder:
        self._used = True
        self._retry()
        layout = self._layout(payload, 0 if prompt is None else len(prompt.key) // ID_BYTES)
        return FileBuilder(self, layout, prompt, self._store.fingerprint, next(self._numbers))

    def discard(self, payload: KVPayload) -> None:
        assert isinstance(payload, FilePayload), "the disk holds files"
        if self._closed:
            return  # the folder is gone, or another process's
        file = payload.file
        before = file.needed_bytes
        file.drop(payload.start, payload.stop)
        self._slack.pop(file.path, None)
        if not file.live:
            self._remove(file.path, before)
            return
        needed = file.needed_bytes
        if needed < before:
            try:
                os.truncate(file.path, needed)
            except FileNotFoundError:
                pass  # the whole file is gone, which whoever reads the rest will notice
            except OSError as error:
                logger.warning("%s cannot be shortened: %s", file.path, error)
                needed = before
        slack = needed - sum(file.share(start, stop) for start, stop in file.live)
        if slack:
            self._slack[file.path] = slack

    def can_free(self) -> bool:
        self._retry()
        with self._changing:
            return not self._stuck

    def _retry(self) -> None:
        with self._changing:
            stuck = list(self._stuck)
        for path in stuck:
            if _unlinked(path) is None:
                with self._changing:
                    self._stuck.pop(path, None)
            else:
                return  # the others will hardly fare better

    def _remove(self, path: Path, nbytes: int) -> None:
        """Removes a file of `nbytes`, now or when that is possible again."""
        error = _unlinked(path)
        if error is not None:
            logger.warning("%s cannot be removed, which will be tried again: %s", path, error)
            with self._changing:
                self._stuck[path] = nbytes

    def _open(self, name: str) -> tuple[Any, Path]:
        """Opens a new file for writing in the pool's folder, which is created again if it is gone."""
        path = self.folder / name
        try:
            return open(path, "wb", buffering=0), path
        except FileNotFoundError:
            with self._changing:
                if self._closed or self._store.path.exists():
                    raise
                logger.warning("the folder %s was removed; creating another", self._store.path)
                gone, self._store = self._store, create_store(self._parent, self._store.fingerprint)
                gone.remove()
        path = self.folder / name
        return open(path, "wb", buffering=0), path

    def close(self) -> None:
        with self._changing:
            if self._closed:
                return
            self._closed = True
            self._leave()

    def _leave(self) -> None:
        if self.persistent:
            self._store.release()
        else:
            self._store.remove()


class FileBuilder:
    """Writes one file, which is opened at its first layer.

    Args:
        fingerprint: digest of what made the payload; the pool may be bound to another one meanwhile.
    """

    device: None = None

    def __init__(
        self, pool: DiskPool, layout: FileLayout, prompt: PromptKey | None, fingerprint: str | None, number: int
    ) -> None:
        self._pool, self._layout, self._prompt, self._fingerprint = pool, layout, prompt, fingerprint
        self._name = f"{number}{SUFFIX}"
        self._digests = bytearray(DIGEST_BYTES * layout.num_digests)
        self._file: Any = None
        self._temporary: Path | None = None

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        if self._file is None:
            self._file, self._temporary = self._pool._open(f".{self._name}{TEMPORARY_SUFFIX}")
        for block, (at, content) in enumerate(pack_layer(self._layout, layer, tensors)):
            _write(self._file, content, at)
            place = (block * len(self._layout.groups) + layer) * DIGEST_BYTES
            self._digests[place : place + DIGEST_BYTES] = hashlib.sha256(content).digest()

    def commit(self) -> FilePayload:
        assert self._temporary is not None, "all layers have been written"
        digests = bytes(self._digests)
        _write(self._file, index_of(self._layout, digests, self._prompt, self._fingerprint), 0)
        self._file.close()
        path = self._temporary.with_name(self._name)
        os.replace(self._temporary, path)
        tokens = self._layout.tokens
        return FilePayload(PromptFile(path, self._layout, digests, [(0, tokens)]), 0, tokens)

    def abort(self) -> None:
        if self._temporary is None:
            return
        try:
            self._file.close()
        except OSError as error:
            logger.debug("closing %s: %s", self._temporary, error)
        self._pool._remove(self._temporary, _size(self._temporary))


def _check(fingerprint: str | None) -> None:
    if fingerprint == "":
        raise ValueError("got an empty fingerprint; accepted: a text that names what makes the KV, or None")


def _number(path: Path) -> int:
    """The number of a file, higher for those written later; -1 for other files."""
    return int(path.stem) if path.stem.isdecimal() else -1


def _write(file: Any, content: bytes, at: int) -> None:
    """Writes all of `content` at byte `at`; the system may take it in parts, e.g. as the disk fills up."""
    file.seek(at)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _unlinked(path: Path) -> OSError | None:
    """Removes a file; returns why that was not possible."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
