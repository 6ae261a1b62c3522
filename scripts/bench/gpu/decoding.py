"""Cases of decoding under eviction: attention over pages, and appending to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from ....eviction.ops import naive
from ....eviction.ops.page_table import append_entries
from ....eviction.ops.paged_attention import ragged_decode
from .case import CARD, FULL, TINY, Call, Heads, KernelBenchCase, Sides, Work, generator, normal, relative_error
from .flex import plain_flex

PAGE = 16
FLEX_ENTRIES = 32768


@dataclass
class PagedInputs:
    """Segments in pages of one layer, in no order; a few pages are free."""

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    free: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def make(cls, lengths: list[int], dim: int, device: str, spare: int = 0) -> PagedInputs:
        """`spare`: free pages a segment, for which the table has room too."""
        owned = [-(-length // PAGE) for length in lengths]
        count, free = sum(owned), spare * len(lengths)
        order = torch.randperm(count + free, generator=generator(device), device=device).int()
        table = torch.zeros(len(lengths), max(owned) + spare, dtype=torch.int32, device=device)
        start = 0
        for segment, pages in enumerate(owned):
            table[segment, :pages] = order[start : start + pages]
            start += pages
        return cls(
            normal(device, count + free, PAGE, dim),
            normal(device, count + free, PAGE, dim, seed=1),
            torch.zeros(count + free, PAGE, dtype=torch.int32, device=device),
            table,
            torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.cat([order[count:], order.new_zeros(count)]),
            torch.tensor([free, 0], dtype=torch.int32, device=device),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As the operations take them."""
        return tuple(vars(self).values())

    def copy(self) -> PagedInputs:
        return PagedInputs(*(tensor.clone() for tensor in self.tensors()))

    def resetting(self) -> Call:
        """A call that restores the lengths and the stack of free pages."""
        names = ("lengths", "free", "counters")
        saved = [(getattr(self, name), getattr(self, name).clone()) for name in names]

        def reset() -> None:
            for tensor, before in saved:
                tensor.copy_(before)

        return reset


@dataclass(frozen=True)
class RaggedDecode(KernelBenchCase):
    """New tokens over what an eviction has left; the last head keeps `kv` times as much as the first."""

    entries: int
    share: float
    q_len: int = 1
    heads: Heads = FULL

    kernel: ClassVar[str] = "ragged decode"
    tolerance: ClassVar[float] = 1.5e-2

    @property
    def shape(self) -> str:
        return f"N={self.entries}, {self.share:.0%} kept, {self.q_len} new"

    def work(self) -> Work:
        kept, heads = self.share * self.entries, self.heads
        return Work(
            4 * heads.kv * kept * heads.dim,
            4 * heads.query * self.q_len * kept * heads.dim,
            heads.query * self.q_len * kept,
        )

    def memory(self) -> float:
        return 12 * self.heads.kv * self.share * self.entries * self.heads.dim

    def lengths(self) -> list[int]:
        kv = self.heads.kv
        mean = self.share * self.entries
        return [max(self.q_len, round(2 * mean * (head + 1) / (kv + 1))) for head in range(kv)]

    def inputs(self, device: str) -> tuple[torch.Tensor, PagedInputs]:
        query = normal(device, 1, self.heads.query, self.q_len, self.heads.dim, seed=2)
        return query, PagedInputs.make(self.lengths(), self.heads.dim, device)

    def sides(self, device: str) -> Sides:
        query, pages = self.inputs(device)
        heads, scaling = self.heads, self.heads.dim**-0.5
        inputs = (query, pages.key, pages.value, pages.table, pages.lengths)
        peers: dict[str, Call] = {"twin": lambda: naive.ragged_decode(*inputs, None, scaling)[0]}
        absent: dict[str, str] = {}
        if self.q_len == 1:
            kept = round(self.share * self.entries)
            key, value = (normal(device, 1, heads.kv, kept, heads.dim, seed=seed) for seed in (3, 4))
            shared = heads.group > 1
            peers["SDPA, equal heads"] = lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=shared)
            if heads != FULL or (self.entries, self.share) == (FLEX_ENTRIES, 0.2):
                peers["FlexAttention, equal heads"] = plain_flex(query, key, value)
            else:
                absent["FlexAttention, equal heads"] = f"is compiled for N={FLEX_ENTRIES}, 20% kept only"
        else:
            absent["SDPA, equal heads"] = "would need a mask for the new tokens"
        return Sides(lambda: ragged_decode(*inputs, scaling), peers, absent)

    def small(self, interpreted: bool) -> RaggedDecode:
        if interpreted:
            return replace(self, entries=90, share=0.5, q_len=min(self.q_len, 3), heads=TINY)
        return replace(self, entries=4096, share=0.2, heads=CARD)

    def error(self, device: str) -> float:
        query, pages = self.inputs(device)
        exact = (query.double(), pages.key.double(), pages.value.double(), pages.table, pages.lengths)
        truth = naive.ragged_decode(*exact, None, self.heads.dim**-0.5)[0]
        ours = ragged_decode(query, pages.key, pages.value, pages.table, pages.lengths, self.heads.dim**-0.5)
        return relative_error(ours, truth)


@dataclass(frozen=True)
class Append(KernelBenchCase):
    """`new` tokens behind `entries` of each head."""

    entries: int
    new: int
    heads: Heads = FULL

    kernel: ClassVar[str] = "append"

    @property
    def shape(self) -> str:
        return f"{self.new} to N={self.entries}"

    def work(self) -> Work:
        return Work(8 * self.heads.kv * self.new * self.heads.dim)

    def memory(self) -> float:
        return 12 * self.heads.kv * (self.entries + 2 * self.new + PAGE) * self.heads.dim

    def inputs(self, device: str) -> tuple[tuple[torch.Tensor, ...], PagedInputs]:
        heads = self.heads
        pages = PagedInputs.make([self.entries] * heads.kv, heads.dim, device, spare=1 + -(-self.new // PAGE))
        index = torch.arange(self.new, dtype=torch.int32, device=device).view(1, -1)
        added = torch.full((heads.kv,), self.new, dtype=torch.int32, device=device)
        key, value = (normal(device, 1, heads.kv, self.new, heads.dim, seed=seed) for seed in (2, 3))
        return (key, value, index + self.entries, index, added), pages

    def sides(self, device: str) -> Sides:
        tokens, pages = self.inputs(device)
        plan = torch.empty(2, self.heads.kv, dtype=torch.int32, device=device)
        twin: Call = lambda: naive.append_entries(*tokens, *pages.tensors(), plan=plan)  # noqa: E731
        return Sides(lambda: append_entries(*tokens, *pages.tensors()), {"twin": twin}, reset=pages.resetting())

    def small(self, interpreted: bool) -> Append:
        heads = TINY if interpreted else CARD
        return replace(self, entries=33, new=min(self.new, 21), heads=heads)

    def error(self, device: str) -> float:
        tokens, pages = self.inputs(device)
        other = pages.copy()
        plan = torch.empty(2, self.heads.kv, dtype=torch.int32, device=device)
        append_entries(*tokens, *pages.tensors())
        naive.append_entries(*tokens, *other.tensors(), plan=plan)
        # What lies behind the stack of free pages, or behind a segment's pages in the table, is of no account.
        same = all(torch.equal(one, two) for one, two in zip(pages.tensors(), other.tensors(), strict=True))
        return 0.0 if same else float("inf")
