"""The file of the disk tier: the KV of a prompt's last tokens, in blocks that are read and verified one by one.

    magic and sizes | header, JSON | key | digests | seal | block 0 | block 1 | …

A block holds the rows of some tokens, layer by layer: for each tensor of the layer its part of these tokens, tokens
first. So a layer of any token range is read without the rest of the file, and a file whose last tokens were evicted is
cut behind the last block that is still needed. A payload that cannot be split is one row of one block.

Everything before the blocks is the index: the header (kinds of the tensors, what made the KV, the namespace), the ids
of the whole prompt as little-endian int32, a SHA-256 of each layer of each block, and a SHA-256 of the index itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tenure.documents import plain_line

from .base import Kind, KVPayload, LostPayloadError, PromptKey, group_layers

if TYPE_CHECKING:
    import torch

MAGIC, SCHEMA = b"tenureKV", 1
DIGEST_BYTES = hashlib.sha256().digest_size
ID_BYTES = 4  # of a token in the key
TYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class FileLayout:
    """The places of all bytes of a file; known before anything is written.

    Attributes:
        kinds: dtype and shape of each tensor by name, of all tokens of the file.
        tokens: that the payload stands for.
        token_dim: the dimension of every tensor that runs over tokens; None: the payload cannot be split.
        block_tokens: tokens of a block.
        prompt_tokens: of the prompt whose last tokens the payload holds.
        header_bytes: of the header, padding included.
        groups: the tensor names of each layer.
        rows, block_rows: of the file and of a block: tokens, or one row for all of an indivisible payload.
        row_bytes: for each layer, bytes of a row of each tensor.
    """

    kinds: dict[str, Kind]
    tokens: int
    token_dim: int | None
    block_tokens: int
    prompt_tokens: int
    header_bytes: int
    groups: tuple[tuple[str, ...], ...] = field(init=False)
    rows: int = field(init=False)
    block_rows: int = field(init=False)
    row_bytes: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        groups = group_layers(self.kinds)
        rows = 1 if self.token_dim is None else self.tokens
        sizes = tuple(tuple(nbytes(self.kinds[name]) // rows for name in group) for group in groups)
        block_rows = min(self.block_tokens, rows)
        for name, value in (("groups", groups), ("rows", rows), ("block_rows", block_rows), ("row_bytes", sizes)):
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def num_digests(self) -> int:
        return self.num_blocks * len(self.groups)

    @property
    def data_at(self) -> int:
        """Bytes of the index; block 0 follows."""
        return _prefix_bytes() + self.header_bytes + ID_BYTES * self.prompt_tokens + DIGEST_BYTES * (
            self.num_digests + 1
        )  # fmt: skip

    def size(self, rows: int) -> int:
        """Bytes of a file that holds all blocks up to row `rows`."""
        whole = min(self.rows, -(-rows // self.block_rows) * self.block_rows)
        return self.data_at + whole * sum(map(sum, self.row_bytes))

    def place(self, block: int, layer: int) -> tuple[int, int]:
        """The first byte of a layer of a block, and the number of the block's rows."""
        first = block * self.block_rows
        rows = min(self.block_rows, self.rows - first)
        before = sum(map(sum, self.row_bytes[:layer]))
        return self.data_at + first * sum(map(sum, self.row_bytes)) + rows * before, rows


@dataclass(eq=False)
class PromptFile:
    """A finished file, shared by the payloads of its parts.

    Attributes:
        digests: `(blocks, layers, 32)`, SHA-256 of each layer of each block.
        live: the token ranges that payloads hold, disjoint and ascending. The pool removes what is evicted from them.
    """

    path: Path
    layout: FileLayout
    digests: bytes
    live: list[tuple[int, int]]

    def digest(self, block: int, layer: int) -> bytes:
        at = (block * len(self.layout.groups) + layer) * DIGEST_BYTES
        return self.digests[at : at + DIGEST_BYTES]

    def rows_of(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the tokens [start, stop)."""
        return (0, 1) if self.layout.token_dim is None else (start, stop)

    def share(self, start: int, stop: int) -> int:
        """Bytes of the file that the tokens [start, stop) are charged: the shares of its parts add up to its size.

        A block that two parts share is charged to the first, and so is the index.
        """
        first, last = self.rows_of(start, stop)
        return self.layout.size(last) - (self.layout.size(first) if first else 0)

    def drop(self, start: int, stop: int) -> None:
        """The tokens [start, stop) are not needed any more."""
        kept = []
        for begin, end in self.live:
            kept += [(begin, min(end, start)), (max(begin, stop), end)]
        self.live = [(begin, end) for begin, end in kept if begin < end]

    @property
    def needed_bytes(self) -> int:
        """Bytes up to the last block with live tokens."""
        return self.layout.size(self.rows_of(*self.live[-1])[1]) if self.live else 0


@dataclass(frozen=True, eq=False)
class FilePayload:
    """The tokens [start, stop) of a file. What describes the file is kept in memory; the data is verified when read.

    `split` and `join` only change which range is meant: the file stays as it is.
    """

    file: PromptFile
    start: int
    stop: int
    layers: tuple[int, ...] = field(init=False)
    nbytes: int = field(init=False)
    device: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        first, last = self.file.rows_of(self.start, self.stop)
        layers = tuple((last - first) * sum(sizes) for sizes in self.file.layout.row_bytes)
        for name, value in (("layers", layers), ("nbytes", sum(layers))):
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def token_dim(self) -> int | None:
        return self.file.layout.token_dim

    @property
    def joins_freely(self) -> bool:
        return True  # with a part of the same file; with another it is not joined

    @property
    def divisible(self) -> bool:
        return self.token_dim is not None

    def kinds(self) -> dict[str, Kind]:
        return {name: self._kind(name) for name in self.file.layout.kinds}

    def _kind(self, name: str) -> Kind:
        dtype, shape = self.file.layout.kinds[name]
        dim = self.token_dim
        if dim is None:
            return dtype, shape
        sizes = list(shape)
        sizes[dim] = self.tokens
        return dtype, tuple(sizes)

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, packed in one block of memory; see `KVPayload.read`."""
        import torch

        from ...eviction.storage.packing import pack, views

        layout, (first, last) = self.file.layout, self.file.rows_of(self.start, self.stop)
        targets = pack(
            {name: self._kind(name) for name in layout.groups[layer]}, lambda size: torch.empty(size, dtype=torch.uint8)
        )
        rows_first = {name: _rows_first(tensor, self.token_dim) for name, tensor in targets.items()}
        try:
            with open(self.path, "rb", buffering=0) as file:
                for block in range(first // layout.block_rows, -(-last // layout.block_rows)):
                    content, rows = self._read_block(file, block, layer)
                    kinds = {name: (rest.dtype, (rows, *rest.shape[1:])) for name, rest in rows_first.items()}
                    flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
                    begin = block * layout.block_rows
                    low, high = max(first, begin), min(last, begin + rows)
                    for name, found in views(flat.view(torch.uint8), kinds).items():
                        rows_first[name][low - first : high - first].copy_(found[low - begin : high - begin])
        except OSError as error:
            raise LostPayloadError(f"{self.path} cannot be read: {error}") from error
        if layer == 0:
            with contextlib.suppress(OSError):
                os.utime(self.path)  # after a restart, the files used last are kept
        return targets

    def _read_block(self, file: BinaryIO, block: int, layer: int) -> tuple[bytearray, int]:
        """A layer of a block, verified, and the number of its rows."""
        at, rows = self.file.layout.place(block, layer)
        content = bytearray(rows * sum(self.file.layout.row_bytes[layer]))
        file.seek(at)
        got = _read_fully(file, memoryview(content))
        if got < len(content):
            raise LostPayloadError(
                f"{self.path} is truncated: layer {layer} of block {block} has {got} of its {len(content)} bytes"
            )
        if hashlib.sha256(content).digest() != self.file.digest(block, layer):
            raise LostPayloadError(
                f"{self.path} is damaged: layer {layer} of block {block} differs from what was written"
            )
        return content, rows

    def split(self, at: int) -> tuple[FilePayload, FilePayload]:
        assert self.divisible and 0 < at < self.tokens, "only divisible payloads are split, within"
        cut = self.start + at
        return FilePayload(self.file, self.start, cut), FilePayload(self.file, cut, self.stop)

    def join(self, other: KVPayload) -> FilePayload | None:
        if not isinstance(other, FilePayload) or other.file is not self.file or other.start != self.stop:
            return None
        return FilePayload(self.file, self.start, other.stop)


# Writing ------------------------------------------------------------------------------------------------------------


def new_layout(payload: KVPayload, prompt_tokens: int, block_tokens: int, label_bytes: int) -> FileLayout:
    """The layout of a file for `payload`.

    Args:
        prompt_tokens: of the prompt whose last tokens it holds.
        label_bytes: room in the header for what does not depend on the payload: namespace, agents, fingerprint.

    Raises:
        ValueError: a tensor of a dtype that files do not hold.
    """
    kinds = payload.kinds()
    described = len(json.dumps(_described(kinds), separators=(",", ":")))
    header_bytes = -(-(described + label_bytes) // 64) * 64
    return FileLayout(kinds, payload.tokens, payload.token_dim, block_tokens, prompt_tokens, header_bytes)


def pack_layer(layout: FileLayout, layer: int, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[int, bytes]]:
    """The bytes of a layer: for each block its place in the file and the content."""
    import torch

    rows = []
    for name, size in zip(layout.groups[layer], layout.row_bytes[layer], strict=True):
        tensor = _rows_first(tensors[name].detach().cpu(), layout.token_dim)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert flat.nbytes == layout.rows * size, "the tensor is of the kind that the payload has announced"
        rows.append((memoryview(flat.data), size))
    for block in range(layout.num_blocks):
        at, count = layout.place(block, layer)
        first = block * layout.block_rows
        yield at, b"".join(data[first * size : (first + count) * size] for data, size in rows)


def index_of(layout: FileLayout, digests: bytes, prompt: PromptKey | None, fingerprint: str | None) -> bytes:
    """The index of a file, `layout.data_at` bytes.

    Args:
        digests: as in `PromptFile`.
        prompt: whose last tokens the file holds. None, a namespace that JSON does not hold, or a label that exceeds
            its room: the file is of no use after a restart.
        fingerprint: of what made the KV; None: unknown, also of no use then.
    """
    header = _header(layout, prompt, fingerprint)
    if len(header) > layout.header_bytes:
        header = _header(layout, None, None)
    header += b" " * (layout.header_bytes - len(header))
    key = b"" if prompt is None else prompt.key
    key += bytes(ID_BYTES * layout.prompt_tokens - len(key))
    index = MAGIC + SCHEMA.to_bytes(4, "little") + len(header).to_bytes(4, "little") + header + key + digests
    return index + hashlib.sha256(index).digest()


def _header(layout: FileLayout, prompt: PromptKey | None, fingerprint: str | None) -> bytes:
    label: dict[str, Any] = {
        "tokens": layout.tokens, "token_dim": layout.token_dim, "block_tokens": layout.block_tokens,
        "prompt_tokens": layout.prompt_tokens, "tensors": _described(layout.kinds),
    }  # fmt: skip
    if prompt is not None and fingerprint is not None:
        with contextlib.suppress(ValueError):  # other namespaces live no longer than the process
            label |= {"fingerprint": fingerprint, "namespace": _to_json(prompt.namespace)}
        label["agents"] = [agent for agent in prompt.agents if isinstance(agent, str)]
    return json.dumps(label, separators=(",", ":")).encode()


def _described(kinds: dict[str, Kind]) -> list[list[Any]]:
    return [[name, type_code(dtype), list(shape)] for name, (dtype, shape) in kinds.items()]


def _to_json(namespace: Hashable) -> Any:
    """JSON from which `_from_json` makes an equal namespace; raises ValueError if there is none."""
    if isinstance(namespace, tuple):
        return [_to_json(each) for each in namespace]
    known = namespace is None or type(namespace) in (bool, int, str)
    if known or (type(namespace) is float and math.isfinite(namespace)):
        return namespace
    raise ValueError(f"got a namespace of {type(namespace).__name__}; accepted: str, int, float, None and tuples")


def _from_json(namespace: Any) -> Hashable:
    if isinstance(namespace, list):
        return tuple(map(_from_json, namespace))
    if isinstance(namespace, dict):
        raise ValueError("namespaces have no dictionaries")
    return namespace


# Reading back -------------------------------------------------------------------------------------------------------


def read_index(path: Path, fingerprint: str, max_header_bytes: int) -> tuple[PromptFile, PromptKey]:
    """The file at `path`, which another process may have written, and the prompt whose last tokens it holds.

    The index is verified; the data is when it is read. If the end of the file is missing, `live` is what is there.

    Args:
        fingerprint: of what makes the KV in this process.

    Raises:
        LostPayloadError: it is not such a file, of another schema, damaged, cut, made by something else, or without a
            prompt.
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = _read(file, _prefix_bytes(), path)
        schema, header_bytes = (int.from_bytes(prefix[at : at + 4], "little") for at in (8, 12))
        if prefix[:8] != MAGIC or schema != SCHEMA:
            raise LostPayloadError(f"{path} is not a file of schema {SCHEMA}")
        if header_bytes > min(size, max_header_bytes):
            raise LostPayloadError(f"{path} has a header of {header_bytes} bytes")
        header = _read(file, header_bytes, path)
        try:
            layout, label = _parse_header(header)
        except (LookupError, TypeError, ValueError, RecursionError, OverflowError, AttributeError) as error:
            raise LostPayloadError(
                f"{path} has an unreadable header: {type(error).__name__}: {plain_line(error)}"
            ) from error
        if layout.data_at > size:
            raise LostPayloadError(f"{path} ends within its index")
        key = _read(file, ID_BYTES * layout.prompt_tokens, path)
        digests = _read(file, DIGEST_BYTES * layout.num_digests, path)
        seal = _read(file, DIGEST_BYTES, path)
    if hashlib.sha256(prefix + header + key + digests).digest() != seal:
        raise LostPayloadError(f"{path} has a damaged index")
    if label.get("fingerprint") != fingerprint or "namespace" not in label:
        raise LostPayloadError(f"{path} holds KV of another origin")
    rows = _rows_present(layout, size)
    if rows == 0:
        raise LostPayloadError(f"{path} has lost its data")
    found = PromptFile(path, layout, digests, [(0, layout.tokens if layout.token_dim is None else rows)])
    return found, PromptKey(label["namespace"], key, label["agents"])


def _parse_header(header: bytes) -> tuple[FileLayout, dict[str, Any]]:
    """The layout, and the header with namespace and agents as they were given."""
    label = json.loads(header)
    label["agents"] = tuple(map(str, label.get("agents", ())))
    if "namespace" in label:
        label["namespace"] = _from_json(label["namespace"])
    kinds = {str(name): (_dtype(code), tuple(map(_natural, shape))) for name, code, shape in label["tensors"]}
    tokens, block_tokens, prompt_tokens = (
        _natural(label[name]) for name in ("tokens", "block_tokens", "prompt_tokens")
    )
    dim = label["token_dim"]
    if not (kinds and block_tokens and 0 < tokens <= prompt_tokens):
        raise ValueError("no tensors or no tokens")
    if dim is not None and any(shape[dim] != tokens for _, shape in kinds.values()):
        raise ValueError("tensors of another number of tokens")
    return FileLayout(kinds, tokens, dim, block_tokens, prompt_tokens, len(header)), label


def _rows_present(layout: FileLayout, size: int) -> int:
    """Rows of the whole blocks in a file of `size` bytes."""
    row = sum(map(sum, layout.row_bytes))
    rows = layout.rows if row == 0 else min(layout.rows, (size - layout.data_at) // row)
    return rows if rows == layout.rows else rows - rows % layout.block_rows


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is not a natural number")
    return value


def type_code(dtype: torch.dtype) -> str:
    """The name of `dtype` in a file; raises ValueError if files do not hold it."""
    name = str(dtype).removeprefix("torch.")
    if name not in TYPE_CODES:
        raise ValueError(f"got a tensor of {name}; the disk accepts {', '.join(TYPE_CODES)}")
    return TYPE_CODES[name]


def _dtype(code: str) -> torch.dtype:
    import torch

    return getattr(torch, {code: name for name, code in TYPE_CODES.items()}[code])


def nbytes(kind: Kind) -> int:
    return kind[0].itemsize * math.prod(kind[1])


def _rows_first(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    """A view of `tensor` whose first dimension runs over the rows of a file."""
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _prefix_bytes() -> int:
    return len(MAGIC) + 8


def _read(file: BinaryIO, count: int, path: Path) -> bytes:
    content = bytearray(count)
    if _read_fully(file, memoryview(content)) < count:
        raise LostPayloadError(f"{path} ends within its index")
    return bytes(content)


def _read_fully(file: BinaryIO, buffer: memoryview) -> int:
    got = 0
    while got < len(buffer):
        more = file.readinto(buffer[got:])  # type: ignore[attr-defined]
        if not more:
            break
        got += more
    return got
