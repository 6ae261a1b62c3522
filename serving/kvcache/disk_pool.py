"""The disk tier: one safetensors file a node, with a digest of every layer; an unreadable file is a cache miss.

A pool owns a folder inside the given one and holds a lock on it: processes may share the given folder, and the next one
removes the folders of those that crashed. Files are written layer by layer under a temporary name, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Kind, KVPayload, LostPayloadError, group_layers
from .memory_pool import Pool

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)
PREFIX, LOCK = "tenure-kv-", "in-use.lock"
DIGEST_CHARACTERS = 64
TYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class FilePayload:
    """A copy in a file. Shapes, offsets and digests are kept in memory, so a damaged header does no harm.

    Attributes:
        path: the file.
        data_at: the byte at which the first tensor begins.
        digests: SHA-256 of each layer's bytes, hexadecimal.
    """

    path: Path
    tokens: int
    token_dim: int | None
    tensors: dict[str, Kind]
    data_at: int
    digests: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = field(init=False)
    layers: tuple[int, ...] = field(init=False)
    nbytes: int = field(init=False)
    divisible: bool = field(default=False, init=False)  # a file stays whole; once loaded, it may be split
    joins_freely: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        groups = group_layers(self.tensors)
        layers = tuple(sum(_nbytes(self.tensors[name]) for name in names) for names in groups)
        for name, value in (("groups", groups), ("layers", layers), ("nbytes", sum(layers))):
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def kinds(self) -> dict[str, Kind]:
        return self.tensors

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        import torch

        from ...eviction.storage.packing import views

        size = self.layers[layer]
        buffer = bytearray(size)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.data_at + sum(self.layers[:layer]))
                got = _read_fully(file, memoryview(buffer))
        except OSError as error:
            raise LostPayloadError(f"{self.path} cannot be read: {error}") from error
        if got < size:
            raise LostPayloadError(f"{self.path} is truncated: layer {layer} has {got} of its {size} bytes")
        if hashlib.sha256(buffer).hexdigest() != self.digests[layer]:
            raise LostPayloadError(f"{self.path} is damaged: layer {layer} differs from what was written")
        block = torch.frombuffer(buffer, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        return views(block, {name: self.tensors[name] for name in self.groups[layer]})

    def split(self, at: int) -> tuple[KVPayload, KVPayload]:
        raise AssertionError("files are not divisible")

    def join(self, other: KVPayload) -> None:
        return None


class DiskPool(Pool):
    """Files in a folder.

    Args:
        capacity: bytes of all files together, headers included.
        folder: created if it does not exist; may be shared with other processes.
    """

    def __init__(self, capacity: int, folder: str | os.PathLike) -> None:
        from filelock import FileLock

        super().__init__(capacity)
        parent = Path(folder)
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        self._lock = FileLock(self.folder / LOCK)
        self._lock.acquire()
        self._numbers = count()

    def validate(self, payload: KVPayload) -> None:
        for dtype, _ in payload.kinds().values():
            _code(dtype)

    def charge(self, payload: KVPayload) -> int:
        return len(_header(payload, None)) + payload.nbytes

    def new_builder(self, payload: KVPayload) -> _FileBuilder:
        return _FileBuilder(payload, self.folder / f"{next(self._numbers)}.safetensors")

    def discard(self, payload: KVPayload) -> None:
        assert isinstance(payload, FilePayload), "the disk holds files"
        payload.path.unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


class _FileBuilder:
    """Writes one file, which is opened at its first layer."""

    def __init__(self, payload: KVPayload, path: Path) -> None:
        self._source, self._path = payload, path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._kinds = payload.kinds()
        self._digests: list[str] = []
        self._file: Any = None

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115  # open until commit or abort
            self._file.write(_header(self._source, None))
        digest = hashlib.sha256()
        for tensor in tensors.values():
            content = _content(tensor)
            digest.update(content)
            self._file.write(content)
        self._digests.append(digest.hexdigest())

    def commit(self) -> FilePayload:
        header = _header(self._source, self._digests)
        self._file.seek(0)
        self._file.write(header)
        # Not synced to the device: nothing is read back after a crash, and the rename excludes partial files.
        self._file.close()
        os.replace(self._temporary, self._path)
        source = self._source
        return FilePayload(self._path, source.tokens, source.token_dim, self._kinds, len(header), tuple(self._digests))

    def abort(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:  # the disk was too full for what was buffered
            logger.debug("closing %s: %s", self._temporary, error)
        self._temporary.unlink(missing_ok=True)


def _header(payload: KVPayload, digests: list[str] | None) -> bytes:
    """The header of a safetensors file, padded to a multiple of 8 bytes; as long with digests as without."""
    blank = ["0" * DIGEST_CHARACTERS] * len(payload.layers)
    document: dict[str, Any] = {"__metadata__": {"tokens": str(payload.tokens), "sha256": " ".join(digests or blank)}}
    at = 0
    for name, (dtype, shape) in payload.kinds().items():
        end = at + _nbytes((dtype, shape))
        document[name] = {"dtype": _code(dtype), "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _code(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in TYPE_CODES:
        raise ValueError(f"got a tensor of {name}; the disk accepts {', '.join(TYPE_CODES)}")
    return TYPE_CODES[name]


def _content(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _nbytes(kind: Kind) -> int:
    return kind[0].itemsize * math.prod(kind[1])


def _read_fully(file: Any, buffer: memoryview) -> int:
    got = 0
    while got < len(buffer):
        more = file.readinto(buffer[got:])
        if not more:
            break
        got += more
    return got


def _remove_abandoned(parent: Path) -> None:
    """Removes the folders of pools whose processes have ended: their locks are free."""
    from filelock import FileLock, Timeout

    for folder in parent.glob(f"{PREFIX}*"):
        try:
            with FileLock(folder / LOCK, timeout=0):
                pass
        except (Timeout, OSError):
            continue  # in use, or being removed by another process
        shutil.rmtree(folder, ignore_errors=True)
