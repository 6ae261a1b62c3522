"""Cases of the tiers: a layer's entries out of pages and back into them, and over the link to pinned memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ....eviction.ops import naive
from ....eviction.ops.copy_entries import copy_entries
from ....eviction.storage.packing import copy_all, memory_like, pack
from .case import CARD, FULL, TINY, Call, Heads, KernelBenchCase, Sides, Work, generator, normal

PAGE = 16
SINGLE_COPIES = 4096  # the most entries whose pages are copied one by one


@dataclass(frozen=True)
class TierCopies(KernelBenchCase):
    """All entries of every head of a layer: keys, values and log β. `way`: gather, scatter or offload."""

    entries: int
    way: str
    heads: Heads = FULL

    kernel: ClassVar[str] = "tier copies"

    @property
    def shape(self) -> str:
        return f"N={self.entries}, {self.way}"

    def work(self) -> Work:
        size = self.heads.kv * self.entries * (4 * self.heads.dim + 4)
        return Work(2 * size, to_host=size if self.way == "offload" else 0.0)

    def memory(self) -> float:
        return 16 * self.heads.kv * self.entries * self.heads.dim

    def inputs(self, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Buffers in pages, contiguous ones, and the slots of whole pages in no order, half of all."""
        pages = self.heads.kv * -(-self.entries // PAGE)
        count = pages * PAGE
        buffers = [normal(device, 2 * count, self.heads.dim, seed=seed) for seed in (0, 1)]
        buffers.append(normal(device, 2 * count, dtype=torch.float32, seed=2))
        chosen = torch.randperm(2 * pages, generator=generator(device), device=device)[:pages]
        slots = (chosen.unsqueeze(1) * PAGE + torch.arange(PAGE, device=device)).flatten()
        kinds = {str(number): (one.dtype, (count, *one.shape[1:])) for number, one in enumerate(buffers)}
        return buffers, list(pack(kinds, memory_like(slots)).values()), slots

    def sides(self, device: str) -> Sides:
        buffers, together, slots = self.inputs(device)
        count = len(slots)
        gather = (buffers, together, slots, None)
        if self.way == "gather":
            return Sides(lambda: copy_entries(*gather), {"twin": lambda: naive.copy_entries(*gather, count)})
        if self.way == "scatter":
            scatter = (together, buffers, None, slots)
            return Sides(lambda: copy_entries(*scatter), {"twin": lambda: naive.copy_entries(*scatter, count)})
        kinds = {str(number): (one.dtype, tuple(one.shape)) for number, one in enumerate(together)}
        locked = pack(kinds, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=slots.is_cuda))
        pinned = list(locked.values())
        starts = slots[::PAGE].tolist()

        def offload() -> None:
            copy_entries(*gather)
            copy_all(pinned, together)

        def one_by_one() -> None:
            for source, target in zip(buffers, pinned, strict=True):
                for page, start in enumerate(starts):
                    into = target[page * PAGE : (page + 1) * PAGE]
                    into.copy_(source[start : start + PAGE], non_blocking=True)

        if self.entries > SINGLE_COPIES:
            return Sides(offload, absent={"a copy a page": "is as many launches as there are pages"})
        peers: dict[str, Call] = {"a copy a page": one_by_one}
        return Sides(offload, peers)

    def small(self, interpreted: bool) -> TierCopies:
        return replace(self, entries=33, heads=TINY) if interpreted else replace(self, entries=1008, heads=CARD)

    def error(self, device: str) -> float:
        buffers, together, slots = self.inputs(device)
        copy_entries(buffers, together, slots, None)
        emptied = [torch.zeros_like(one) for one in buffers]
        copy_entries(together, emptied, None, slots)
        same = True
        for one, gathered, back in zip(buffers, together, emptied, strict=True):
            same = same and torch.equal(gathered, one[slots]) and torch.equal(back[slots], one[slots])
            same = same and int((back != 0).sum()) == int((one[slots] != 0).sum())
        return 0.0 if same else float("inf")
