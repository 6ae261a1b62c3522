"""Cases of an eviction: window scores, value norms, selection over all layers, and compaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ....eviction.ops import naive
from ....eviction.ops.page_table import move_entries, release_pages
from ....eviction.ops.radix_select import select_top
from ....eviction.ops.value_norms import value_norms
from ....eviction.ops.window_risk import window_risk
from .case import (
    CARD,
    FULL,
    HIDDEN,
    LAYERS,
    TINY,
    Call,
    Heads,
    KernelBenchCase,
    Sides,
    Work,
    generator,
    normal,
    relative_error,
)
from .decoding import PAGE, PagedInputs

WINDOW, POOLING = 32, 5
TWIN_NORMS = 32768  # entries from which on the twin's loop takes seconds
SHARE = 0.2  # that stays


@dataclass(frozen=True)
class DefensiveScores(KernelBenchCase):
    """The worst case and the mean of a window's pooled attention."""

    entries: int
    window: int = WINDOW
    heads: Heads = FULL

    kernel: ClassVar[str] = "defensive scoring"
    tolerance: ClassVar[float] = 1e-3

    @property
    def shape(self) -> str:
        return f"N={self.entries}, w={self.window}"

    def work(self) -> Work:
        heads, pairs = self.heads, self.heads.query * self.window * self.entries
        return Work(4 * heads.kv * self.entries * heads.dim, 4 * pairs * heads.dim + 6 * 64 * pairs, 2 * pairs)

    def memory(self) -> float:
        return 8 * self.heads.kv * self.entries * self.heads.dim

    def inputs(self, device: str) -> tuple[Any, ...]:
        """As `window_risk` takes them."""
        heads, n = self.heads, self.entries
        query = normal(device, 1, heads.query, self.window, heads.dim, seed=1)
        positions = torch.arange(n, dtype=torch.int32, device=device).expand(1, heads.kv, n).contiguous()
        times = torch.arange(n - self.window, n, dtype=torch.int32, device=device).view(1, -1)
        keys = normal(device, 1, heads.kv, n, heads.dim)
        return query, keys, positions, times, times[:, 0].clone(), heads.dim**-0.5, POOLING, True

    def sides(self, device: str) -> Sides:
        inputs = self.inputs(device)
        return Sides(lambda: window_risk(*inputs), {"twin": lambda: naive.window_risk(*inputs)})

    def small(self, interpreted: bool) -> DefensiveScores:
        if interpreted:
            return replace(self, entries=70, window=3, heads=TINY)
        return replace(self, entries=1008, heads=CARD)

    def error(self, device: str) -> float:
        queries, keys, *others = self.inputs(device)
        truth = naive.window_risk(queries.double(), keys.double(), *others)
        ours = window_risk(queries, keys, *others)
        return max(relative_error(one, other) for one, other in zip(ours, truth, strict=True) if one is not None)


@dataclass(frozen=True)
class ValueNorms(KernelBenchCase):
    """Norms of the values' contributions to a layer's output."""

    model: str
    entries: int
    hidden: int = 0
    heads: Heads = FULL

    kernel: ClassVar[str] = "value norms"
    tolerance: ClassVar[float] = 1e-3

    @property
    def shape(self) -> str:
        return f"{self.model}, N={self.entries}"

    @property
    def width(self) -> int:
        return self.hidden or HIDDEN[self.model]

    def work(self) -> Work:
        heads = self.heads
        memory = 2 * heads.kv * self.entries * heads.dim + 2 * heads.query * heads.dim * self.width
        return Work(memory, 2 * heads.query * self.entries * heads.dim * self.width)

    def memory(self) -> float:
        return 16 * self.heads.kv * self.entries * self.heads.dim + 8 * self.heads.query * self.heads.dim * self.width

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.heads
        weight = normal(device, heads.query, heads.dim, self.width, seed=1)
        return normal(device, 1, heads.kv, self.entries, heads.dim), weight

    def sides(self, device: str) -> Sides:
        inputs = self.inputs(device)
        if self.entries > TWIN_NORMS:
            return Sides(lambda: value_norms(*inputs), absent={"twin": "goes through tens of thousands of parts"})
        return Sides(lambda: value_norms(*inputs), {"twin": lambda: naive.value_norms(*inputs)})

    def small(self, interpreted: bool) -> ValueNorms:
        sizes = (70, 40, TINY) if interpreted else (1008, 640, CARD)
        return replace(self, model="check", entries=sizes[0], hidden=sizes[1], heads=sizes[2])

    def error(self, device: str) -> float:
        values, weight = self.inputs(device)
        groups = weight.double().unflatten(0, (self.heads.kv, self.heads.group))
        truth = (values.double().unsqueeze(2) @ groups).abs().sum(-1).mean(2)
        return relative_error(value_norms(values, weight), truth)


@dataclass(frozen=True)
class Selection(KernelBenchCase):
    """The best entries of all layers and heads of a row."""

    model: str
    entries: int
    segments: int = 0

    kernel: ClassVar[str] = "selection"

    @property
    def shape(self) -> str:
        return f"{self.model}, N={self.entries}, all layers"

    @property
    def streams(self) -> int:
        return self.segments or LAYERS[self.model] * FULL.kv

    def work(self) -> Work:
        return Work(25 * self.streams * self.entries)

    def memory(self) -> float:
        return 60 * self.streams * self.entries

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        total = self.streams * self.entries
        positions = torch.arange(self.entries, dtype=torch.int32, device=device).repeat(self.streams).view(1, -1)
        bounds = torch.arange(0, total + 1, self.entries, dtype=torch.int32, device=device)
        k = torch.tensor([int(SHARE * total)], dtype=torch.int32, device=device)
        return normal(device, 1, total, dtype=torch.float32), positions, k, bounds

    def sides(self, device: str) -> Sides:
        scores, positions, k, bounds = self.inputs(device)
        wanted = int(k)
        peers: dict[str, Call] = {
            "twin": lambda: naive.select_top(scores, positions, k, bounds),
            "torch.topk": lambda: scores.topk(wanted, dim=1, sorted=False),
        }
        return Sides(lambda: select_top(scores, positions, k, bounds), peers)

    def small(self, interpreted: bool) -> Selection:
        return replace(self, model="check", entries=33 if interpreted else 4096, segments=3 if interpreted else 16)

    def error(self, device: str) -> float:
        """Scores with many equal ones, so that positions and segments decide too."""
        scores, *others = self.inputs(device)
        for tried in (scores, (scores * 4).round()):
            ours, expected = select_top(tried, *others), naive.select_top(tried, *others)
            if not all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True)):
                return float("inf")
        return 0.0


@dataclass(frozen=True)
class Compaction(KernelBenchCase):
    """Compaction of keys, values, positions and one state of a layer, and release of its pages."""

    entries: int
    heads: Heads = FULL

    kernel: ClassVar[str] = "compaction"

    @property
    def shape(self) -> str:
        return f"N={self.entries}, {SHARE:.0%} kept"

    def work(self) -> Work:
        heads, kept = self.heads, SHARE * self.entries
        return Work(2 * heads.kv * kept * (4 * heads.dim + 8) + heads.kv * self.entries)

    def memory(self) -> float:
        return 12 * self.heads.kv * self.entries * self.heads.dim

    def inputs(self, device: str) -> tuple[PagedInputs, torch.Tensor, torch.Tensor]:
        """PagedInputs, their state, and what to keep."""
        segments = self.heads.kv
        pages = PagedInputs.make([self.entries] * segments, self.heads.dim, device)
        state = normal(device, *pages.position.shape, dtype=torch.float32, seed=2)
        chance = torch.rand(segments, self.entries, generator=generator(device, 3), device=device)
        return pages, state, chance < SHARE

    @staticmethod
    def compact(
        move: Callable[..., None],
        release: Callable[..., None],
        pages: PagedInputs,
        state: torch.Tensor,
        keep: torch.Tensor,
    ) -> None:
        for buffer in (pages.key, pages.value, pages.position, state):
            move(keep, pages.lengths, pages.table, buffer)
        kept = keep.sum(1, dtype=torch.int32)
        release(pages.lengths, kept, pages.table, pages.free, pages.counters, PAGE)

    def sides(self, device: str) -> Sides:
        pages, state, keep = self.inputs(device)
        twin: Call = lambda: self.compact(naive.move_entries, naive.release_pages, pages, state, keep)  # noqa: E731
        ours: Call = lambda: self.compact(move_entries, release_pages, pages, state, keep)  # noqa: E731
        return Sides(ours, {"twin": twin}, reset=pages.resetting())

    def small(self, interpreted: bool) -> Compaction:
        return replace(self, entries=70 if interpreted else 1008, heads=TINY if interpreted else CARD)

    def error(self, device: str) -> float:
        pages, state, keep = self.inputs(device)
        other, other_state = pages.copy(), state.clone()
        self.compact(move_entries, release_pages, pages, state, keep)
        self.compact(naive.move_entries, naive.release_pages, other, other_state, keep)
        free = int(pages.counters[0])
        same = torch.equal(pages.free[:free], other.free[:free]) and torch.equal(pages.lengths, other.lengths)
        for segment, length in enumerate(pages.lengths.tolist()):
            slots = naive.entry_slots(pages.table[segment], 0, length, PAGE)
            for one, two in zip((*pages.tensors()[:3], state), (*other.tensors()[:3], other_state), strict=True):
                same = same and torch.equal(one.flatten(0, 1)[slots], two.flatten(0, 1)[slots])
        return 0.0 if same else float("inf")
