"""The memory of a tier: pools, which count its bytes before anything is allocated, and the pinned arena.

Locking pages is slow and stalls the GPU, and PyTorch's allocator of pinned memory rounds every block up to a power of
two. The arena instead locks large slabs once, when they are first needed, and cuts blocks of any size out of them.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .base import KVPayload, PhantomPayload, PromptKey, TensorPayload, Tier
from .free_ranges import FreeRanges
from .page_pool import PageBuilder, PagePayload, PagePool, pages_for

if TYPE_CHECKING:
    import torch


class PayloadBuilder(Protocol):
    """A copy of a payload in the making, written layer by layer by one thread at a time.

    Attributes:
        device: where the copy's tensors are; None: in a file, or nowhere.
    """

    @property
    def device(self) -> torch.device | None: ...

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Copies the contents of one layer, in order.

        On a GPU the work may still be queued on the current stream, which must have waited for the copy's memory.
        """

    def commit(self) -> KVPayload:
        """The finished copy, after every layer has been written."""
        ...

    def abort(self) -> None:
        """Frees what the unfinished copy has allocated. Does not raise."""


class Pool(ABC):
    """Counts the bytes of one tier's copies, finished and in the making; `used + available == capacity`.

    Who owns the bytes: `TierStorage` those of a node's copy, from `allocate` until it frees the copy; `TransferManager`
    those of a copy in the making, which pass to the storage when the transfer is done and are freed when it fails; and
    whoever called `reserve` the reserved ones, until `unreserve`. Changed under the cache's lock only.

    Attributes:
        capacity: bytes.
        whole_pages: memory for the KV of requests is handed out in whole pages of the prefix tree, not by the token.
        used: bytes allocated, for copies or reserved.
        reserved: of these, the bytes of requests in progress, which do not belong to the tree.
        evictable: of these, the bytes of copies of unreferenced nodes.
        pending_free: bytes that transfers in progress into slower tiers will free here.

    Raises:
        ValueError: a negative capacity.
    """

    whole_pages = True

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"got a capacity of {capacity} bytes; accepted: 0 (no such tier) or more")
        self.capacity = capacity
        self.used = self.evictable = self.pending_free = self.reserved = 0

    @property
    def available(self) -> int:
        return self.capacity - self.used

    @property
    def persistent(self) -> bool:
        """Whether copies outlive the cache: closing it leaves them, and `new_builder` is given their prompts."""
        return False

    def charge(self, payload: KVPayload) -> int:
        """Bytes that a copy of `payload` takes here, without those of `prompt_bytes`."""
        return payload.nbytes

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes that a new copy takes here for the ids of its prompt, `tokens` from the beginning of that on."""
        return 0

    def validate(self, payload: KVPayload) -> None:  # noqa: B027  # memory holds everything
        """Raises ValueError if the tier cannot hold such a payload, whatever its size."""

    def can_allocate(self, nbytes: int) -> bool:
        return nbytes <= self.available

    def allocate(self, nbytes: int) -> None:
        assert self.can_allocate(nbytes), "room is made before it is allocated"
        self.used += nbytes

    def free(self, nbytes: int) -> None:
        self.used -= nbytes
        assert self.used >= 0, "what is freed was allocated"

    def reserve(self, nbytes: int) -> None:
        """Allocates for KV that is computed outside the tree; `unreserve` frees it."""
        self.allocate(nbytes)
        self.reserved += nbytes

    def unreserve(self, nbytes: int) -> None:
        self.free(nbytes)
        self.reserved -= nbytes
        assert self.reserved >= 0, "what is unreserved was reserved"

    def can_free(self) -> bool:
        """Whether discarding copies makes bytes available; False while what was discarded cannot be removed."""
        return True

    @abstractmethod
    def new_builder(self, payload: KVPayload, prompt: PromptKey | None = None) -> PayloadBuilder:
        """Allocates memory for a copy of `payload`, whose bytes have been counted.

        Args:
            prompt: whose last tokens the payload holds; given to persistent pools.

        Raises:
            OSError, RuntimeError, MemoryError: there is less memory than the capacity promises.
        """

    def discard(self, payload: KVPayload) -> None:  # noqa: B027  # reference counting frees memory
        """Called when a copy, or a part of one that was split, leaves the tier, to free what reference counting does
        not. Does not raise."""

    def close(self) -> None:  # noqa: B027
        """Called once, when the cache is closed."""


@dataclass(frozen=True)
class ArenaConfig:
    """Sizes of a `PinnedArena`.

    Attributes:
        block_bytes: alignment of blocks, and what their sizes are rounded up to.
        slab_bytes: of a slab, unless a block needs more; slabs are rounded up to powers of two.
        min_slab: smallest slab, as a share of the capacity.
        overhead: slabs that are locked beyond the capacity, as a share of it, so that a block is found although what is
            free is fragmented.

    Raises:
        ValueError: a size or share that is not above 0 (overhead: below 0).
    """

    block_bytes: int = 512
    slab_bytes: int = 2**28
    min_slab: float = 1 / 8
    overhead: float = 1 / 4

    def __post_init__(self) -> None:
        if not (self.block_bytes > 0 and self.slab_bytes > 0 and self.min_slab > 0 and self.overhead >= 0):
            raise ValueError(f"got {self}; accepted: sizes and shares above 0, an overhead of 0 or more")

    def rounded(self, nbytes: int) -> int:
        """Bytes that a block of `nbytes` takes."""
        return -(-nbytes // self.block_bytes) * self.block_bytes


_SLAB_STRIDE = 2**48  # distance between the addresses of two slabs, so that their free ranges never meet


class PinnedArena:
    """Blocks of page-locked memory, by `FreeRanges`.

    Whoever holds a tensor that shares a block's storage owns the block; when the last one is gone, it is free again, so
    nobody frees a block that is still being read. Blocks are allocated by one thread at a time and may be freed on any.

    Args:
        capacity: bytes allocated at a time, each block rounded up (`ArenaConfig.rounded`).
        lock_pages: allocates a slab, uint8 `(nbytes,)`.
    Attributes:
        used: bytes allocated.
        locked: bytes of all slabs.
    """

    def __init__(
        self, capacity: int, lock_pages: Callable[[int], torch.Tensor], config: ArenaConfig | None = None
    ) -> None:
        self.config = config or ArenaConfig()
        self.capacity = self.config.rounded(capacity)
        self.used = self.locked = 0
        self._lock_pages = lock_pages
        self._slabs: list[torch.Tensor] = []
        self._free = FreeRanges()
        # Blocks that were freed: the collector may do so at any moment, also while this thread is in here.
        self._returned: deque[tuple[int, int]] = deque()
        self._busy = threading.Lock()

    def block(self, nbytes: int) -> torch.Tensor:
        """Allocates uninitialised memory, uint8 `(nbytes,)`.

        Raises:
            MemoryError: less than that is free, or only in pieces.
        """
        import torch

        size = max(self.config.block_bytes, self.config.rounded(nbytes))
        with self._busy:
            self._collect_returned()
            address = self._cut(size)
        piece = self._slabs[address // _SLAB_STRIDE].numpy()[address % _SLAB_STRIDE :][:nbytes]
        weakref.finalize(piece, self._returned.append, (address, size)).atexit = False
        return torch.from_numpy(piece)

    def _cut(self, size: int) -> int:
        if size > self.capacity - self.used:
            raise MemoryError(f"{size} bytes are asked for, {self.capacity - self.used} are free")
        if self._free.longest < size:
            self._add_slab(size)
        start = self._free.take(size)
        assert start is not None, "there is a range as long as that"
        self.used += size
        return start

    def _add_slab(self, size: int) -> None:
        if self.locked >= self.capacity + int(self.capacity * self.config.overhead):
            raise MemoryError(f"{size} bytes are asked for, and the free memory is fragmented into smaller pieces")
        smallest = int(self.capacity * self.config.min_slab)
        wanted = min(self.config.slab_bytes, max(self.capacity - self.locked, smallest))
        nbytes = 1 << (max(size, wanted) - 1).bit_length()
        self._slabs.append(self._lock_pages(nbytes))
        self.locked += nbytes
        start = (len(self._slabs) - 1) * _SLAB_STRIDE
        self._free.add(start, start + nbytes)

    def _collect_returned(self) -> None:
        while self._returned:
            start, size = self._returned.popleft()
            self.used -= size
            self._free.add(start, start + size)


def page_locked(nbytes: int) -> torch.Tensor:
    """Memory that a GPU can access by itself, uint8 `(nbytes,)`."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class MemoryPool(Pool):
    """Tensors on a device or in host memory; those of a layer are contiguous, so that copying it is one copy.

    Args:
        capacity: bytes.
        device: of the tensors.
        pinned: page-locked, so that a GPU copies at full speed and asynchronously; needs a GPU. Each layer is then
            charged what it takes of a `PinnedArena`.
        arena: sizes of that arena.
    Attributes:
        pages: what an engine has bound it to: copies are then lists of pages; None: tensors of their own.

    Raises:
        ValueError: a negative capacity, or pinned memory where there is no GPU.
    """

    def __init__(
        self, capacity: int, device: str | torch.device = "cpu", pinned: bool = False, arena: ArenaConfig | None = None
    ) -> None:
        super().__init__(capacity)
        self.device, self.pinned = device, pinned
        self.pages: PagePool | None = None
        self._arena = None
        if pinned:
            try:
                page_locked(1)
            except RuntimeError as error:
                raise ValueError("pinned=True needs a GPU that torch sees; without one, pinned=False") from error
            self._arena = PinnedArena(capacity, page_locked, arena)

    def bind(self, pages: PagePool) -> None:
        """Holds its copies in `pages` from now on.

        Raises:
            ValueError: it holds something already.
        """
        if self.pages is not None or self.used:
            raise ValueError("got a pool that is in use; accepted: one pool for each engine, empty when that is made")
        self.pages, self.device, self.capacity = pages, pages.device, pages.nbytes

    def validate(self, payload: KVPayload) -> None:
        if self.pages is not None:
            pages_for(payload, self.pages.geometry)

    def holds(self, device: torch.device) -> bool:
        """Whether the pool's tensors are on `device`; without an index, a GPU is the first one."""
        import torch

        own = torch.device(self.device)
        return own.type == device.type and (own.index or 0) == (device.index or 0)

    def charge(self, payload: KVPayload) -> int:
        if self.pages is not None:
            return pages_for(payload, self.pages.geometry) * self.pages.geometry.page_bytes
        return payload.nbytes if self._arena is None else sum(map(self._arena.config.rounded, payload.layers))

    def new_builder(self, payload: KVPayload, prompt: PromptKey | None = None) -> PayloadBuilder:
        if self.pages is not None:
            return PageBuilder(self.pages, payload)
        return _TensorBuilder(TensorPayload.empty_like(payload, self._memory, self._memory_of_parts))

    def discard(self, payload: KVPayload) -> None:
        if isinstance(payload, PagePayload):  # somebody may hold the payload a little longer, but not its pages
            payload.held.release()

    def _memory(self, nbytes: int) -> torch.Tensor:
        import torch

        if self._arena is not None:
            return self._arena.block(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _memory_of_parts(self, nbytes: int) -> torch.Tensor:
        """For a copy that is split or joined: its bytes then exist twice, for which a full arena has no room."""
        import torch

        try:
            return self._memory(nbytes)
        except MemoryError:
            return torch.empty(nbytes, dtype=torch.uint8)  # pageable: slower to copy, otherwise the same


@dataclass
class _TensorBuilder:
    result: TensorPayload

    @property
    def device(self) -> torch.device:
        return self.result.device

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        from ...eviction.storage.packing import copy_all

        targets = self.result.read(layer)
        copy_all(list(targets.values()), [tensors[name] for name in targets])

    def commit(self) -> KVPayload:
        return self.result

    def abort(self) -> None:
        pass  # the memory is freed with the tensors


def check_devices(pools: Mapping[Tier, Pool], device: torch.device) -> None:
    """Raises ValueError unless the memory pools are where a model on `device` needs them: the device tier on `device`,
    the tiers below it in the memory of the CPU."""
    import torch

    for tier, pool in pools.items():
        wanted = device if tier == Tier.DEVICE else torch.device("cpu")
        if isinstance(pool, MemoryPool) and not pool.holds(wanted):
            raise ValueError(
                f"got a pool of Tier.{tier.name} on {pool.device} for a model on {device}; "
                f"accepted: MemoryPool(…, device={str(wanted)!r})"
            )


class PhantomPool(Pool):
    """Counts bytes and holds no data: any tier of the simulator.

    Args:
        whole_pages: requests get memory as an engine gives it; the papers' systems count tokens.
    """

    def __init__(self, capacity: int, whole_pages: bool = False) -> None:
        super().__init__(capacity)
        self.whole_pages = whole_pages

    def new_builder(self, payload: KVPayload, prompt: PromptKey | None = None) -> PayloadBuilder:
        assert isinstance(payload, PhantomPayload), "a pool without memory holds payloads without data"
        return _PhantomBuilder(payload)


@dataclass
class _PhantomBuilder:
    payload: PhantomPayload
    device: None = None

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def commit(self) -> KVPayload:
        return self.payload

    def abort(self) -> None:
        pass
