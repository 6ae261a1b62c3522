"""Tiers, links, and the payloads that move between them.

A payload is the KV of a token span in the memory of one tier: named tensors, copied layer by layer. The tree and the
tiers depend only on its size, its layers and whether it can be split. `PhantomPayload` implements the same protocol
without tensors, so the simulator runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Tier(IntEnum):
    """The memories that hold KV; the smaller, the faster."""

    DEVICE = 0
    HOST = 1
    DISK = 2


TIERS = tuple(Tier)
Link = tuple[Tier, Tier]  # source, target


class Status(Enum):
    """The state of a node as a scheduler sees it."""

    GPU = "gpu"  # on the device, ready to be used
    CPU = "cpu"
    DISK = "disk"
    LOADING = "loading"  # being copied into a faster tier
    OFFLOADING = "offloading"  # being copied into a slower tier; the copy in the faster one is still usable
    ABSENT = "absent"  # in no tier


class LoadState(Enum):
    """Whether everything that a handle covers is on the device."""

    READY = "everything is on the device"
    LOADING = "transfers are in progress; call load() again"
    WAITING = "room on the device is being made; call load() again"
    NO_ROOM = "the device has no room and nothing may be evicted: compute the prompt, or retry when others are done"
    LOST = "a part cannot be read back: release the handle and open the prompt again"


class Urgency(IntEnum):
    """The kind of a transfer; on a link, the smaller runs first."""

    DEMAND = 0  # a request waits for it
    WRITE_BACK = 1  # an eviction waits for it
    PREFETCH = 2
    EAGER = 3  # an eager write-back: its source is likely to be evicted soon, and nothing waits for it yet


Kind = tuple["torch.dtype", tuple[int, ...]]  # dtype and shape of a tensor
Memory = Callable[[int], "torch.Tensor"]  # allocates that many bytes: uint8 `(nbytes,)`


@dataclass(frozen=True)
class PromptKey:
    """The prompt whose last tokens a payload holds: by it, a copy that outlives the process is found again.

    Attributes:
        namespace: see `PrefixTree`.
        key: all token ids of the prompt, see `radix_tree.encode`.
        agents: those whose fixed prompt this is.
    """

    namespace: Hashable
    key: bytes
    agents: tuple[Hashable, ...] = ()


class LostPayloadError(Exception):
    """A stored payload is missing or damaged; the cache treats that as a miss."""


class KVPayload(Protocol):
    """The KV that one tier holds for a node.

    Attributes:
        tokens: prompt tokens that it stands for. A compressed payload may have fewer entries.
        nbytes: bytes of its data.
        layers: bytes of each part that is copied in one go; they add up to `nbytes`.
        divisible: whether `split` is possible. A payload that was compressed as a whole is not divisible, because the
            entries kept at its beginning depend on its end.
        token_dim: the tensor dimension that runs over tokens, if there is one.
        joins_freely: `join` and `split` copy no data, so that nodes of such payloads are merged whenever nothing
            separates them.
        device: where its tensors are; None: in a file, or nowhere.
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

    @property
    def joins_freely(self) -> bool:
        return False

    @property
    def device(self) -> torch.device | None: ...

    def kinds(self) -> dict[str, Kind]:
        """Dtype and shape of each tensor by name, layer by layer; empty for a payload without data."""
        ...

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer by name; verified if they come from a file.

        On a GPU, the caller's current stream waits for what writes them.

        Raises:
            LostPayloadError: they are missing or differ from what was written.
        """
        ...

    def split(self, at: int) -> tuple[KVPayload, KVPayload]:
        """The first `at` tokens and the rest, each in newly allocated memory; `self` is unchanged."""
        ...

    def join(self, other: KVPayload) -> KVPayload | None:
        """`self` followed by `other` in newly allocated memory; None if they cannot be joined."""


@dataclass(frozen=True, eq=False)
class TensorPayload:
    """Tensors in the memory of a device.

    On a GPU, a payload is created on the stream that writes its tensors, or on the one that was current when their
    memory was allocated. An event is recorded there, and every stream that reads or writes them later waits for it.

    Attributes:
        tensors: by name. Names that agree up to their last dot form a layer, e.g. `layers.3.key` and `layers.3.value`.
            Layers are copied in the order in which they first appear.
        tokens: as in `KVPayload`.
        token_dim: the dimension of every tensor that runs over tokens (-2 for keys and values of shape `(batch,
            num_kv_heads, seq_len, head_dim)`); None if there is none, which makes the payload indivisible.
        memory: allocates the results of `split` and `join`, one block a layer; None: on the tensors' device.
        groups: the tensor names of each layer.
        written: that event; None on a CPU.

    Raises:
        ValueError: no tensors, no tokens, or a tensor with another number of tokens.
    """

    tensors: Mapping[str, torch.Tensor]
    tokens: int
    token_dim: int | None = -2
    memory: Memory | None = None
    groups: tuple[tuple[str, ...], ...] = field(init=False)
    layers: tuple[int, ...] = field(init=False)
    nbytes: int = field(init=False)
    written: Any = field(init=False)

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
        self._record()

    @property
    def divisible(self) -> bool:
        return self.token_dim is not None

    @property
    def joins_freely(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def _record(self) -> None:
        object.__setattr__(self, "written", record_event(self.device))

    def kinds(self) -> dict[str, Kind]:
        return {n: (self.tensors[n].dtype, tuple(self.tensors[n].shape)) for names in self.groups for n in names}

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        tensors = {name: self.tensors[name] for name in self.groups[layer]}
        use_on_stream(self.device, tensors.values(), self.written)
        return tensors

    @classmethod
    def empty_like(cls, payload: KVPayload, memory: Memory, memory_of_parts: Memory) -> TensorPayload:
        """Uninitialised tensors for a copy of `payload`, each layer in one block of `memory`.

        Args:
            memory_of_parts: becomes the copy's own `memory`, for later splits and joins.
        """
        return cls(_pack_layers(payload.kinds(), memory), payload.tokens, payload.token_dim, memory_of_parts)

    def split(self, at: int) -> tuple[TensorPayload, TensorPayload]:
        assert self.divisible and 0 < at < self.tokens, "only divisible payloads are split, within"
        # Copies: views would keep the memory of both halves alive until the last of them is evicted.
        return self._assemble(at, [(0, self, 0)]), self._assemble(self.tokens - at, [(0, self, at)])

    def join(self, other: KVPayload) -> TensorPayload | None:
        dim = self.token_dim
        if not isinstance(other, TensorPayload) or dim is None or other.token_dim != dim:
            return None
        mine, others = ([(n, t.dtype, t.ndim) for n, t in each.tensors.items()] for each in (self, other))
        if mine != others:
            return None
        return self._assemble(self.tokens + other.tokens, [(0, self, 0), (self.tokens, other, 0)])

    def _assemble(self, tokens: int, pieces: Sequence[tuple[int, TensorPayload, int]]) -> TensorPayload:
        """A payload of `tokens` tokens from pieces (offset in the result, source, offset in the source)."""
        dim = self.token_dim
        assert dim is not None
        kinds = {}
        for name, tensor in self.tensors.items():
            shape = list(tensor.shape)
            shape[dim] = tokens
            kinds[name] = tensor.dtype, tuple(shape)
        result = TensorPayload(_pack_layers(kinds, self._memory()), tokens, dim, self.memory)
        for _, piece, _ in pieces:
            use_on_stream(piece.device, piece.tensors.values(), piece.written)
        for name, target in result.tensors.items():
            for into, piece, start in pieces:
                length = min(piece.tokens - start, tokens - into)
                target.narrow(dim, into, length).copy_(piece.tensors[name].narrow(dim, start, length))
        result._record()
        return result

    def _memory(self) -> Memory:
        from ...eviction.storage.packing import memory_like

        return self.memory or memory_like(next(iter(self.tensors.values())))


@dataclass(frozen=True, eq=False)
class PhantomPayload:
    """A payload with a size and no data, for any tier."""

    tokens: int
    nbytes: int
    num_layers: int = 1
    divisible: bool = True
    token_dim: int | None = None
    device: None = field(default=None, init=False)
    layers: tuple[int, ...] = field(init=False)

    @property
    def joins_freely(self) -> bool:
        return self.divisible

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


def record_event(device: torch.device | None) -> Any:
    """An event after everything queued so far on the current stream of `device`; None unless that is a GPU."""
    if device is None or device.type != "cuda":
        return None
    import torch

    return torch.cuda.current_stream(device).record_event()


def use_on_stream(device: torch.device, tensors: Iterable[torch.Tensor], event: Any) -> None:
    """Prepares the current stream of a GPU for reading or writing `tensors` there; does nothing if `event` is None.

    The stream waits for `event`, one of `record_event`; and if the tensors are freed before the stream has used them,
    their memory is not given to anybody until then.
    """
    if event is None:
        return
    import torch

    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(stream)


def group_layers(names: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    """The tensor names of each layer, layers in the order in which they first appear."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _pack_layers(kinds: Mapping[str, Kind], memory: Memory) -> dict[str, torch.Tensor]:
    """Uninitialised tensors, those of each layer in one block of `memory`."""
    from ...eviction.storage.packing import pack

    tensors = {}
    for names in group_layers(kinds):
        tensors |= pack({name: kinds[name] for name in names}, memory)
    return {name: tensors[name] for name in kinds}
