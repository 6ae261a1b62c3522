"""How long a batch takes: a roofline of the card and the model (rates fitted to measured batches: `fitting.py`).

A batch is counted once for what all of it shares, the weights that are read, and once a token for what it computes; the
slower of the two decides (Williams, Waterman and Patterson 2009). So a prefill's tokens per second depend on its length
and on what runs beside it, and a decode step costs nearly the same for one request as for ten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..node import Tier


@dataclass(frozen=True)
class Batch:
    """What is computed in one go.

    Attributes:
        chunks: of prompts, [start, end): tokens whose KV is computed with the first `start` in the cache.
        contexts: tokens in the cache of each request that decodes.
        steps: decode steps of all of these; 1 beside chunks.
    """

    chunks: Sequence[tuple[int, int]] = ()
    contexts: Sequence[int] = ()
    steps: int = 1


class CostModel(Protocol):
    """Seconds on the device, and (as `orders.Costs`) what it takes to have KV back."""

    def batch_s(self, batch: Batch) -> float: ...

    def recompute_s(self, start: int, end: int) -> float: ...

    def reload_s(self, nbytes: int, tier: Tier) -> float: ...


@dataclass(frozen=True)
class Links:
    """The ways between tiers, both directions at full speed at the same time, as PCIe.

    Attributes:
        host_bytes_per_s, disk_bytes_per_s: between DEVICE and HOST, and HOST and DISK; 0 for one that does not exist.
        latency_s: before each part of a copy.
    """

    host_bytes_per_s: float
    disk_bytes_per_s: float = 0.0
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.host_bytes_per_s, self.disk_bytes_per_s, self.latency_s) < 0:
            raise ValueError(
                f"got links of {self.host_bytes_per_s} and {self.disk_bytes_per_s} bytes/s with {self.latency_s} s "
                "before each part; accepted: 0 or more"
            )

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        """To bring `nbytes` into `tier` from below it; infinity if nothing is below."""
        speed = {Tier.DEVICE: self.host_bytes_per_s, Tier.HOST: self.disk_bytes_per_s}.get(tier, 0.0)
        return self.latency_s + nbytes / speed if speed else math.inf


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        flops: FLOP/s, dense, of the type the model has.
        memory_bytes, memory_bytes_per_s: its size and its bandwidth.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_bytes_per_s: float


@dataclass(frozen=True)
class ModelShape:
    """What a decoder-only model costs.

    Attributes:
        params: all parameters, an input embedding and an output head among them.
        embedding_params: of each of these two. The rows of the former are looked up, neither multiplied nor read as a
            whole; the latter is multiplied for the last token of a chunk only.
        layers, query_width, num_kv_heads, head_dim: `query_width` is query heads times head_dim.
        bytes_per_param: of weights, and of the numbers in the cache.
    """

    name: str
    params: float
    embedding_params: float
    layers: int
    query_width: int
    num_kv_heads: int
    head_dim: int
    bytes_per_param: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.num_kv_heads * self.head_dim * self.bytes_per_param

    @property
    def weight_bytes(self) -> float:
        """Read by every forward pass."""
        return (self.params - self.embedding_params) * self.bytes_per_param


@dataclass(frozen=True)
class RooflineCosts:
    """Seconds by operations and bytes, at stated shares of what the card can do.

    Attributes:
        compute_share: of the card's peak FLOP/s that a prefill reaches.
        memory_share: of its bandwidth that a decode step reaches.
        overhead_s: of every forward pass, for what is neither.
    """

    card: Card
    model: ModelShape
    links: Links
    compute_share: float = 0.6
    memory_share: float = 0.77
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.compute_share <= 1 and 0 < self.memory_share <= 1) or self.overhead_s < 0:
            raise ValueError(
                f"got compute_share={self.compute_share}, memory_share={self.memory_share}, overhead_s="
                f"{self.overhead_s}; accepted: shares above 0 and at most 1, an overhead of 0 or more"
            )

    def pool_bytes(self, memory_share: float) -> float:
        """Bytes for KV if weights and KV take that share of the card's memory."""
        left = self.card.memory_bytes * memory_share - self.model.params * self.model.bytes_per_param
        if left <= 0:
            raise ValueError(f"{self.model.name} does not fit in {memory_share:.0%} of {self.card.name}")
        return left

    def batch_s(self, batch: Batch) -> float:
        # Both sides of the roofline are linear in the step, so the middle step stands for all.
        pairs = read = sum(batch.contexts) + len(batch.contexts) * (batch.steps - 1) / 2
        new = 0
        for start, end in batch.chunks:
            new += end - start
            pairs += (end * end - start * start) / 2
            read += end
        ends = len(batch.chunks) + len(batch.contexts)
        return batch.steps * self._forward_s(new + len(batch.contexts), ends, pairs, read)

    def recompute_s(self, start: int, end: int) -> float:
        return self._forward_s(end - start, 1, (end * end - start * start) / 2, end)

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        return self.links.reload_s(nbytes, tier)

    @cached_property
    def _rates(self) -> tuple[float, float, float, float, float, float, float]:
        """Operations a token, an output and a pair, and a second; bytes of the weights and a token, and a second."""
        model = self.model
        return (
            2 * (model.params - 2 * model.embedding_params),
            2 * model.embedding_params,
            4 * model.layers * model.query_width,
            self.card.flops * self.compute_share,
            model.weight_bytes,
            model.kv_bytes_per_token,
            self.card.memory_bytes_per_s * self.memory_share,
        )

    def _forward_s(self, tokens: float, ends: int, pairs: float, read: float) -> float:
        """Of `tokens` new tokens, `ends` of them with an output; `pairs` of queries and keys; `read` tokens of KV."""
        a_token, an_output, a_pair, operations_per_s, weights, kv, bytes_per_s = self._rates
        compute = (a_token * tokens + an_output * ends + a_pair * pairs) / operations_per_s
        memory = (weights + kv * read) / bytes_per_s
        return (compute if compute > memory else memory) + self.overhead_s
