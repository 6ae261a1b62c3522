"""How long a batch takes: a roofline of the card and the model (rates fitted to measured batches: `fitting.py`).

A batch is counted once for what all of it shares, the weights that are read, and once a token for what it computes; the
slower of the two decides (Williams, Waterman and Patterson 2009). So a prefill's tokens per second depend on its length
and on what runs beside it, and a decode step costs nearly the same for one request as for ten.

Cards and models of the papers, by their data sheets and configurations.

These numbers and the two shares in `RooflineCosts` are all that times are made of. They were written down before the
first run of a policy and are not fitted to any ratio.

Rates that are fitted to the batches of a trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from ..kvcache.base import Tier


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


_Kind = TypeVar("_Kind")

# Dense BF16 tensor cores. H100: NVIDIA's data sheet, SXM5. A10G: its data sheet; it is the variant of the A10 that AWS
# has, with 70 instead of 125 TFLOPS (baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference).
CARDS = {
    "h100": Card("H100 80 GB", 989e12, 80e9, 3350e9),
    "a10g": Card("A10G 24 GB", 70e12, 24e9, 600e9),
}

# From the models' config.json: parameters, vocabulary × hidden size, layers, query heads × head_dim, KV heads and
# head_dim.
MODELS = {
    "llama-3.1-8b": ModelShape("Llama-3.1-8B", 8.03e9, 128256 * 4096, 32, 4096, 8, 128),
    "qwen2.5-32b": ModelShape("Qwen2.5-32B", 32.76e9, 152064 * 5120, 64, 5120, 8, 128),
}


def card(name: str) -> Card:
    """Raises ValueError for an unknown name."""
    return _find(CARDS, name, "card")


def model(name: str) -> ModelShape:
    """Raises ValueError for an unknown name."""
    return _find(MODELS, name, "model")


def _find(known: dict[str, _Kind], name: str, what: str) -> _Kind:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r:.60}; known: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class FittedCosts:
    """Rates that were fitted to measured batches (`fit`), in seconds.

    Attributes:
        forward_s: of every forward pass.
        token_s: of every new token. pair_s: of every pair of a new token and one before it.
        request_s: of every request that decodes, on top.
        links: for `reload_s`.
    """

    forward_s: float
    token_s: float
    pair_s: float
    request_s: float
    links: Links = field(default_factory=lambda: Links(0.0))

    def batch_s(self, batch: Batch) -> float:
        return sum(
            a * b
            for a, b in zip(features(batch), (self.forward_s, self.token_s, self.pair_s, self.request_s), strict=True)
        )

    def recompute_s(self, start: int, end: int) -> float:
        return self.batch_s(Batch(chunks=((start, end),)))

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        return self.links.reload_s(nbytes, tier)


def features(batch: Batch) -> tuple[float, float, float, float]:
    """What `FittedCosts` multiplies: forward passes, new tokens of prompts, pairs, decoded tokens."""
    new = sum(end - start for start, end in batch.chunks)
    contexts = sum(batch.contexts) + len(batch.contexts) * (batch.steps - 1) / 2
    pairs = sum((end * end - start * start) / 2 for start, end in batch.chunks) + batch.steps * contexts
    return (float(batch.steps), float(new), pairs, float(batch.steps * len(batch.contexts)))


def fit(measured: Sequence[tuple[Batch, float]], links: Links) -> FittedCosts:
    """Least squares over batches and the seconds they took, no rate below 0.

    A batch counts by one over what it is predicted to take, again and again until that settles; then the predicted
    seconds add up to the measured ones, as those of a Poisson regression do.

    Raises:
        ValueError: fewer than 8 batches.
    """
    if len(measured) < 8:
        raise ValueError(f"got {len(measured)} measured batches; accepted: 8 or more")
    seconds = np.array([max(1e-9, took) for _, took in measured])
    rows = np.array([features(batch) for batch, _ in measured])
    expected = np.full(len(seconds), seconds.mean())
    rates = np.zeros(rows.shape[1])
    for _ in range(20):
        rates = _no_rate_below_0(rows / np.sqrt(expected)[:, None], seconds / np.sqrt(expected))
        expected = np.maximum(rows @ rates, 1e-3 * seconds.mean())
    forward_s, token_s, pair_s, request_s = map(float, rates)
    return FittedCosts(forward_s, token_s, pair_s, request_s, links)


def _no_rate_below_0(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Least squares; a rate that comes out below 0 is left out, and the others are found anew."""
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-12)
    rates, active = np.zeros(rows.shape[1]), np.ones(rows.shape[1], dtype=bool)
    while active.any():
        rates[:] = 0.0
        rates[active] = np.linalg.lstsq(rows[:, active] / scale[active], goal, rcond=None)[0] / scale[active]
        if (rates >= 0).all():
            break
        active &= rates > 0
    return rates
