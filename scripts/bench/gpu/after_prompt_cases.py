"""Cases of training after a prompt: the last queries of a sequence, under decays or with one bias a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ....retention.ops import biased_attention, gated_attention_after, naive
from .case import CARD, FULL, TINY, Call, Heads, KernelBenchCase, Sides, Work, normal, relative_error
from .training import BF16, FP32, log_betas, with_gradients

QUERIES = 1024  # tokens after the prompt
TWIN_LENGTH = 32768


@dataclass(frozen=True)
class AfterPrompt(KernelBenchCase):
    """Forward and backward of `queries` after the rest of `seq_len`; with `bias`, as after soft eviction."""

    seq_len: int
    bias: bool
    queries: int = QUERIES
    heads: Heads = FULL

    kernel: ClassVar[str] = "attention after a prompt"
    tolerance: ClassVar[float] = 1.5e-2

    @property
    def shape(self) -> str:
        return f"{self.queries} of T={self.seq_len}, {'bias' if self.bias else 'decays'}, forward and backward"

    def work(self) -> Work:
        (new, length), heads = (self.queries, self.seq_len), self.heads
        pairs = heads.query * new * (length - new / 2)
        memory = 6 * BF16 * heads.dim * (heads.query * new + heads.kv * length)
        memory += FP32 * (3 * heads.kv * length + 4 * heads.query * new)
        return Work(memory, 18 * pairs * heads.dim, 3 * pairs)

    def memory(self) -> float:
        return 10 * BF16 * (self.heads.kv * self.seq_len + self.heads.query * self.queries) * self.heads.dim

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, length = self.heads, self.seq_len
        query = normal(device, 1, self.queries, heads.query, heads.dim).transpose(1, 2)
        key, value = (normal(device, 1, length, heads.kv, heads.dim, seed=seed).transpose(1, 2) for seed in (1, 2))
        bias = log_betas(device, 1, heads.kv, length) * (2000 if self.bias else 1)
        return tuple(x.requires_grad_() for x in (query, key, value, bias))  # type: ignore[return-value]

    def run(self, tensors: tuple[Any, ...], kernels: str) -> Call:
        """`triton` or `reference`, or the explicit bias if `twin`."""
        scaling, weight = self.heads.dim**-0.5, normal(str(tensors[0].device), *tensors[0].shape, seed=3)
        ours: Callable[..., torch.Tensor] = biased_attention if self.bias else gated_attention_after
        twin: Callable[..., torch.Tensor] = naive.biased_attention if self.bias else naive.gated_attention_after
        if kernels == "twin":
            return with_gradients(lambda: twin(*tensors, scaling), tensors, weight.to(tensors[0].dtype))
        return with_gradients(lambda: ours(*tensors, scaling, kernels), tensors, weight)

    def sides(self, device: str) -> Sides:
        query, key, value, _ = tensors = self.inputs(device)
        peers: dict[str, Call] = {"channels, fp32": self.run(tensors, "reference")}
        absent = {"FlexAttention": "is compiled for whole sequences only"}
        if self.seq_len <= TWIN_LENGTH:
            peers["twin"] = self.run(tensors, "twin")
        else:
            absent["twin"] = "holds a number a pair and head"
        mask, shared = causal_lower_right(self.queries, self.seq_len), self.heads.group > 1

        def plain() -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shared)

        weight = normal(device, *query.shape, seed=3)
        peers["SDPA without bias"] = with_gradients(plain, (query, key, value), weight)
        return Sides(self.run(tensors, "triton"), peers, absent)

    def small(self, interpreted: bool) -> AfterPrompt:
        sizes = (37, 18, TINY) if interpreted else (656, 208, CARD)
        return replace(self, seq_len=sizes[0], queries=sizes[1], heads=sizes[2])

    def error(self, device: str) -> float:
        tensors = self.inputs(device)
        exact = tuple(x.detach().double().requires_grad_() for x in tensors)
        pairs = zip(self.run(tensors, "triton")(), self.run(exact, "twin")(), strict=True)
        return max(relative_error(one, other) for one, other in pairs)
