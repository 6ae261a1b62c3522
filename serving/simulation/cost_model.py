"""Seconds of a batch: by a roofline of a card and a model, or by rates fitted to the measured batches of a trace.

Work that a batch shares, the weights that are read, is counted once, and work per token once a token; the slower of
operations and memory traffic decides (Williams, Waterman and Patterson 2009). A prefill's tokens per second therefore
depend on its length and on the rest of the batch, and a decode step costs nearly the same for one request as for ten.

The data sheets of cards, the configurations of models and the two shares in `RooflineCosts` determine all times. They
were written down before the first run of a policy and are not fitted to any result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from tenure.checked import NotNegative, verify

from ..kvcache.base import Tier
from ..kvcache.eviction_policy import Costs

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch that its time depends on.

    Attributes:
        chunks: of prompts, [start, end): tokens whose KV is computed with the first `start` in the cache.
        contexts: tokens in the cache of each decoding request.
        steps: decode steps of all of these; 1 if there are chunks.
    """

    chunks: Sequence[tuple[int, int]] = ()
    contexts: Sequence[int] = ()
    steps: int = 1


class CostModel(Costs, Protocol):
    """Seconds of batches, as well as of recomputing and reloading single prompts."""

    def batch_s(self, batch: BatchShape) -> float:
        """Seconds to compute a batch."""
        ...


@dataclass(frozen=True)
class Links:
    """Bandwidths between tiers; both directions run at full speed at the same time, as on PCIe.

    Attributes:
        host_bytes_per_s, disk_bytes_per_s: between DEVICE and HOST, and between HOST and DISK; 0: no such link.
        latency_s: seconds before each part of a copy.

    Raises:
        ValueError: a value below 0 or not finite.
    """

    host_bytes_per_s: NotNegative
    disk_bytes_per_s: NotNegative = 0.0
    latency_s: NotNegative = 0.0

    def __post_init__(self) -> None:
        verify(self, "links")

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        """Seconds to load `nbytes` into `tier` from the tier below; infinity if there is none."""
        speed = {Tier.DEVICE: self.host_bytes_per_s, Tier.HOST: self.disk_bytes_per_s}.get(tier, 0.0)
        return self.latency_s + nbytes / speed if speed else math.inf


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        flops: dense FLOP/s of the model's data type.
        memory_bytes, memory_bytes_per_s: capacity and bandwidth.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_bytes_per_s: float


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a decoder-only model.

    Attributes:
        params: all parameters, including an input embedding and an output head.
        embedding_params: of each of these two. Rows of the input embedding are looked up, neither multiplied nor read
            as a whole; the output head is multiplied for the last token of a chunk only.
        query_width: query heads times head_dim.
        bytes_per_param: bytes of a weight, and of a number in the cache.
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


# Dense BF16 tensor cores. H100: NVIDIA's data sheet, SXM5. A10G: its data sheet; it is the variant of the A10 that AWS
# has, with 70 instead of 125 TFLOPS (baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference).
CARDS = {"h100": Card("H100 80 GB", 989e12, 80e9, 3350e9), "a10g": Card("A10G 24 GB", 70e12, 24e9, 600e9)}

# From each config.json: parameters, vocabulary × hidden size, layers, query heads × head_dim, KV heads and head_dim.
MODELS = {
    "llama-3.1-8b": ModelSpec("Llama-3.1-8B", 8.03e9, 128256 * 4096, 32, 4096, 8, 128),
    "qwen2.5-32b": ModelSpec("Qwen2.5-32B", 32.76e9, 152064 * 5120, 64, 5120, 8, 128),
}


def get_card(name: str) -> Card:
    """The card of that name; ValueError for an unknown one."""
    return _find(CARDS, name, "card")


def get_model_spec(name: str) -> ModelSpec:
    """The model of that name; ValueError for an unknown one."""
    return _find(MODELS, name, "model")


def _find(known: dict[str, _Found], name: str, what: str) -> _Found:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r:.60}; known: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class RooflineCosts:
    """Seconds by operations and memory traffic, at fixed shares of the card's peak.

    Attributes:
        compute_share: share of the card's peak FLOP/s that a prefill reaches.
        memory_share: share of its bandwidth that a decode step reaches.
        overhead_s: additional seconds of every forward pass.

    Raises:
        ValueError: a share outside (0, 1], or a negative overhead.
    """

    card: Card
    model: ModelSpec
    links: Links
    compute_share: float = 0.6
    memory_share: float = 0.77
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.compute_share <= 1 and 0 < self.memory_share <= 1) or not (0 <= self.overhead_s < math.inf):
            raise ValueError(
                f"got compute_share={self.compute_share}, memory_share={self.memory_share}, overhead_s="
                f"{self.overhead_s}; accepted: shares above 0 and at most 1, an overhead of 0 or more"
            )

    def pool_bytes(self, memory_share: float) -> float:
        """Bytes left for KV if weights and KV together take `memory_share` of the card's memory.

        Raises:
            ValueError: the weights alone take more.
        """
        left = self.card.memory_bytes * memory_share - self.model.params * self.model.bytes_per_param
        if not left > 0:
            raise ValueError(f"{self.model.name} does not fit in {memory_share:.0%} of {self.card.name}")
        return left

    def batch_s(self, batch: BatchShape) -> float:
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
        """Operations per token, output, pair and second; bytes of the weights, per cached token, and per second."""
        model = self.model
        return (
            2 * (model.params - 2 * model.embedding_params), 2 * model.embedding_params,
            4 * model.layers * model.query_width, self.card.flops * self.compute_share, model.weight_bytes,
            model.kv_bytes_per_token, self.card.memory_bytes_per_s * self.memory_share,
        )  # fmt: skip

    def _forward_s(self, tokens: float, ends: int, pairs: float, read: float) -> float:
        """Seconds for `tokens` new tokens, `ends` outputs, `pairs` of query and key, and `read` cached tokens."""
        a_token, an_output, a_pair, operations_per_s, weights, kv, bytes_per_s = self._rates
        compute = (a_token * tokens + an_output * ends + a_pair * pairs) / operations_per_s
        memory = (weights + kv * read) / bytes_per_s
        return (compute if compute > memory else memory) + self.overhead_s


@dataclass(frozen=True)
class FittedCosts:
    """Rates fitted to measured batches by `fit_costs`, in seconds.

    Attributes:
        forward_s: per forward pass.
        token_s: per new token of a prompt. pair_s: per pair of a token and one before it.
        request_s: per decoded token.
        links: for `reload_s`.
    """

    forward_s: float
    token_s: float
    pair_s: float
    request_s: float
    links: Links = field(default_factory=lambda: Links(0.0))

    def batch_s(self, batch: BatchShape) -> float:
        rates = (self.forward_s, self.token_s, self.pair_s, self.request_s)
        return sum(a * b for a, b in zip(batch_features(batch), rates, strict=True))

    def recompute_s(self, start: int, end: int) -> float:
        return self.batch_s(BatchShape(chunks=((start, end),)))

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        return self.links.reload_s(nbytes, tier)


def batch_features(batch: BatchShape) -> tuple[float, float, float, float]:
    """The factors of the rates of `FittedCosts`: forward passes, new prompt tokens, pairs, decoded tokens."""
    new = sum(end - start for start, end in batch.chunks)
    contexts = sum(batch.contexts) + len(batch.contexts) * (batch.steps - 1) / 2
    pairs = sum((end * end - start * start) / 2 for start, end in batch.chunks) + batch.steps * contexts
    return (float(batch.steps), float(new), pairs, float(batch.steps * len(batch.contexts)))


def fit_costs(measured: Sequence[tuple[BatchShape, float]], links: Links) -> FittedCosts:
    """Least squares over batches and the seconds they took, with no rate below 0.

    Batches are weighted by the inverse of their predicted seconds, repeatedly until the weights settle. The predicted
    seconds then add up to the measured ones, as in a Poisson regression.

    Raises:
        ValueError: fewer than 8 batches.
    """
    if len(measured) < 8:
        raise ValueError(f"got {len(measured)} measured batches; accepted: 8 or more")
    seconds = np.array([max(1e-9, took) for _, took in measured])
    rows = np.array([batch_features(batch) for batch, _ in measured])
    expected = np.full(len(seconds), seconds.mean())
    rates = np.zeros(rows.shape[1])
    for _ in range(20):
        rates = _non_negative_least_squares(rows / np.sqrt(expected)[:, None], seconds / np.sqrt(expected))
        expected = np.maximum(rows @ rates, 1e-3 * seconds.mean())
    forward_s, token_s, pair_s, request_s = map(float, rates)
    return FittedCosts(forward_s, token_s, pair_s, request_s, links)


def _non_negative_least_squares(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Least squares; rates that come out negative are fixed at 0 and the others fitted again."""
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-12)
    rates, active = np.zeros(rows.shape[1]), np.ones(rows.shape[1], dtype=bool)
    while active.any():
        rates[:] = 0.0
        rates[active] = np.linalg.lstsq(rows[:, active] / scale[active], goal, rcond=None)[0] / scale[active]
        if (rates >= 0).all():
            break
        active &= rates > 0
    return rates
