"""The KV of a span as the memory of one tier holds it: named tensors, copied a layer at a time.

The tree and the tiers see nothing of it but its bytes, its layers, and whether it can be cut in two. `PhantomPayload`
has the same face and no tensors: with it, the simulator runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


Kind = tuple["torch.dtype", tuple[int, ...]]  # type and shape of a tensor
Memory = Callable[[int], "torch.Tensor"]  # gives so many bytes, uint8 `(nbytes,)`


class KVPayload(Protocol):
    """What a tier holds of a node.

    Attributes:
        tokens: tokens of the prompt it stands for. A compressed payload may have fewer entries than that.
        nbytes: bytes of its data.
        layers: bytes of each part that is copied in one go; they add up to `nbytes`.
        divisible: `split` works. What was compressed as a whole is not divisible: which entries were kept at its
            beginning depends on its end.
        token_dim: the dimension of its tensors that runs over the tokens, if it has any.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def divisible(self) -> bool: ...

    @property
    def token_dim(self) -> int | None: ...

    def kinds(self) -> dict[str, Kind]:
        """Type and shape of each tensor by name, layer by layer; none for a payload without data."""
        ...

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer by name, checked if they come from a file.

        Raises:
            LostCopyError: they cannot be had any more, or are not what was written.
        """
        ...

    def split(self, at: int) -> tuple[KVPayload, KVPayload]:
        """The first `at` tokens and the rest, each with memory of its own; `self` is left as it is."""
        ...

    def join(self, other: KVPayload) -> KVPayload | None:
        """`self` followed by `other` with memory of its own; None if they cannot be joined."""
        ...


class LostPayloadError(Exception):
    """A copy that is gone or damaged: to the tree a miss."""


@dataclass(frozen=True, eq=False)
class TensorPayload:
    """Tensors in the memory of a device.

    Attributes:
        tensors: by name. Names with the same beginning, up to the last dot, are one layer: `layers.3.key`,
            `layers.3.value`. Layers are copied in the order in which they first appear.
        tokens: as in `KVPayload`.
        token_dim: the dimension of every tensor that runs over the tokens (-2 for keys and values of shape `(batch,
            num_kv_heads, seq_len, head_dim)`); None if there is none, which makes the payload indivisible.
        memory: where `split` and `join` get the memory of their results, so many bytes for each layer; None: beside
            the tensors.
        groups: the names of each layer.
    """

    tensors: Mapping[str, torch.Tensor]
    tokens: int
    token_dim: int | None = -2
    memory: Memory | None = None
    groups: tuple[tuple[str, ...], ...] = field(init=False)
    layers: tuple[int, ...] = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.tensors:
            raise ValueError(f"got {len(self.tensors)} tensors for {self.tokens} tokens; accepted: one or more of both")
        dim = self.token_dim
        if dim is not None:
            wrong = {name: tuple(t.shape) for name, t in self.tensors.items() if t.shape[dim] != self.tokens}
            if wrong:
                raise ValueError(f"got {wrong}; accepted: {self.tokens} tokens in dimension {dim} of each tensor")
        groups = group_layers(self.tensors)
        layers = tuple(sum(self.tensors[name].nbytes for name in names) for names in groups)
        for name, value in (("groups", groups), ("layers", layers), ("nbytes", sum(layers))):
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def divisible(self) -> bool:
        return self.token_dim is not None

    def kinds(self) -> dict[str, Kind]:
        return {n: (self.tensors[n].dtype, tuple(self.tensors[n].shape)) for names in self.groups for n in names}

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in self.groups[layer]}

    @classmethod
    def empty_like(cls, payload: KVPayload, memory: Memory, of_parts: Memory) -> TensorPayload:
        """Room for a copy of `payload`: each layer in one block of `memory`; `of_parts` becomes its `memory`."""
        return cls(_packed(payload.kinds(), memory), payload.tokens, payload.token_dim, of_parts)

    def split(self, at: int) -> tuple[TensorPayload, TensorPayload]:
        dim = self.token_dim
        assert dim is not None and 0 < at < self.tokens, "only divisible payloads are split, within"
        # Copies: views would keep the memory of both halves alive until the last of them is evicted.
        return self._made(at, [(0, self, 0)]), self._made(self.tokens - at, [(0, self, at)])

    def join(self, other: KVPayload) -> TensorPayload | None:
        dim = self.token_dim
        if not isinstance(other, TensorPayload) or dim is None or other.token_dim != dim:
            return None
        if list(self.tensors) != list(other.tensors):
            return None
        pairs = [(tensor, other.tensors[name]) for name, tensor in self.tensors.items()]
        if any(a.dtype != b.dtype or a.ndim != b.ndim for a, b in pairs):
            return None
        return self._made(self.tokens + other.tokens, [(0, self, 0), (self.tokens, other, 0)])

    def _made(self, tokens: int, pieces: Sequence[tuple[int, TensorPayload, int]]) -> TensorPayload:
        """A payload of `tokens` tokens: of each piece those from the last number on stand from the first number on."""
        dim = self.token_dim
        assert dim is not None
        kinds = {}
        for name, tensor in self.tensors.items():
            shape = list(tensor.shape)
            shape[dim] = tokens
            kinds[name] = tensor.dtype, tuple(shape)
        made = TensorPayload(_packed(kinds, self._memory()), tokens, dim, self.memory)
        for name, target in made.tensors.items():
            for into, piece, start in pieces:
                length = min(piece.tokens - start, tokens - into)
                target.narrow(dim, into, length).copy_(piece.tensors[name].narrow(dim, start, length))
        return made

    def _memory(self) -> Memory:
        from ...eviction.storage.packing import memory_like

        return self.memory or memory_like(next(iter(self.tensors.values())))


@dataclass(frozen=True, eq=False)
class PhantomPayload:
    """A payload of so many bytes and no data, in any tier."""

    tokens: int
    nbytes: int
    num_layers: int = 1
    divisible: bool = True
    token_dim: int | None = None
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        each, more = divmod(self.nbytes, self.num_layers)
        object.__setattr__(self, "layers", (each + 1,) * more + (each,) * (self.num_layers - more))

    def kinds(self) -> dict[str, Kind]:
        return {}

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        return {}

    def split(self, at: int) -> tuple[PhantomPayload, PhantomPayload]:
        assert self.divisible and 0 < at < self.tokens, "only divisible payloads are split, within"
        first = self.nbytes * at // self.tokens
        rest = PhantomPayload(self.tokens - at, self.nbytes - first, self.num_layers)
        return PhantomPayload(at, first, self.num_layers), rest

    def join(self, other: KVPayload) -> PhantomPayload | None:
        if not isinstance(other, PhantomPayload) or not (self.divisible and other.divisible):
            return None
        return PhantomPayload(self.tokens + other.tokens, self.nbytes + other.nbytes, self.num_layers)


def _packed(kinds: Mapping[str, Kind], memory: Memory) -> dict[str, torch.Tensor]:
    """Uninitialised tensors, those of each layer in one block of `memory`."""
    from ...eviction.storage.packing import pack

    tensors = {}
    for names in group_layers(kinds):
        tensors |= pack({name: kinds[name] for name in names}, memory)
    return {name: tensors[name] for name in kinds}


def group_layers(names: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    """The names of each layer, layers in the order in which they first appear."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(tuple(group) for group in groups.values())


class Tier(IntEnum):
    """Where a copy lies; the smaller, the faster."""

    DEVICE = 0
    HOST = 1
    DISK = 2


TIERS = tuple(Tier)


class Status(Enum):
    """What a scheduler sees of a node."""

    GPU = "gpu"  # ready to be used
    CPU = "cpu"
    DISK = "disk"
    LOADING = "loading"  # a copy into a faster tier is under way
    OFFLOADING = "offloading"  # a copy into a slower tier is under way; what the faster one holds can still be used
    ABSENT = "absent"  # no tier holds it


Link = tuple[Tier, Tier]  # from, to


class Urgency(IntEnum):
    """Smaller goes first."""

    DEMAND = 0  # a request waits for it
    WRITE_BACK = 1  # an eviction waits for it
    PREFETCH = 2
    AHEAD = 3  # the source is likely to be evicted next, and nothing waits for that yet
