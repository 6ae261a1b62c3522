"""Cases of training: gated attention and occupancy, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from ....retention.ops import gated_attention, naive, occupancy, occupancy_at
from ....retention.ops.channels import channels
from ....retention.segments import Segments
from .case import CARD, FULL, LAYERS, TINY, Call, Heads, KernelBenchCase, Sides, Work, generator, normal, relative_error
from .flex import gated_flex

TWIN_LENGTH = 4096  # the longest whose T x T numbers of all heads are held
CHANNELS_LENGTH = FLEX_LENGTH = 32768
BF16, FP32 = 2, 4  # bytes


def with_gradients(forward: Call, tensors: tuple[torch.Tensor, ...], weight: torch.Tensor) -> Call:
    """Forward and the gradients of the tensors."""
    return lambda: torch.autograd.grad(forward(), tensors, weight)


def log_betas(device: str, *shape: int) -> torch.Tensor:
    """log β of gates that keep their entries for some thousand tokens."""
    return -1e-3 * torch.rand(*shape, generator=generator(device, 1), device=device)


@dataclass(frozen=True)
class GatedAttention(KernelBenchCase):
    """One document a row; all four gradients if `backward`."""

    seq_len: int
    backward: bool = False
    heads: Heads = FULL

    kernel: ClassVar[str] = "gated attention"
    tolerance: ClassVar[float] = 1.5e-2

    @property
    def shape(self) -> str:
        return f"T={self.seq_len}, {'forward and backward' if self.backward else 'forward'}"

    def work(self) -> Work:
        length, (query, kv, dim) = self.seq_len, (self.heads.query, self.heads.kv, self.heads.dim)
        pairs = length**2 / 2
        memory = 2 * length * dim * (2 * query + 2 * kv) + 4 * length * (kv + query + 1)
        if not self.backward:
            return Work(memory, 4 * query * pairs * dim, query * pairs)
        memory += 2 * length * dim * (4 * query + 4 * kv) + 4 * length * (2 * kv + 3 * query + 1)
        return Work(memory, 18 * query * pairs * dim, 3 * query * pairs)

    def memory(self) -> float:
        return 10 * BF16 * self.seq_len * self.heads.query * self.heads.dim

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, length = self.heads, self.seq_len
        query = normal(device, 1, length, heads.query, heads.dim).transpose(1, 2)
        key, value = (normal(device, 1, length, heads.kv, heads.dim, seed=seed).transpose(1, 2) for seed in (1, 2))
        tensors = query, key, value, log_betas(device, 1, heads.kv, length)
        return tuple(x.requires_grad_(self.backward) for x in tensors)  # type: ignore[return-value]

    def _call(self, forward: Call, tensors: tuple[torch.Tensor, ...]) -> Call:
        if not self.backward:
            return forward
        return with_gradients(forward, tensors, normal(str(tensors[0].device), *tensors[0].shape, seed=3))

    def sides(self, device: str) -> Sides:
        query, key, value, log_beta = tensors = self.inputs(device)
        scaling, rows = self.heads.dim**-0.5, Segments.whole(1, self.seq_len, device)
        peers: dict[str, Call] = {}
        absent: dict[str, str] = {}
        if self.seq_len <= TWIN_LENGTH:
            peers["twin"] = self._call(lambda: naive.gated_attention(*tensors, scaling, rows), tensors)
        else:
            absent["twin"] = "holds T x T numbers a head"
        shared = self.heads.group > 1

        def plain() -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)

        peers["SDPA without decay"] = self._call(plain, tensors[:3])
        if self.seq_len <= CHANNELS_LENGTH:
            peers["channels, fp32"] = self._call(lambda: channels(*tensors, scaling, rows), tensors)
        else:
            absent["channels, fp32"] = "takes seconds"
        if self.seq_len == FLEX_LENGTH or self.heads != FULL:
            peers["FlexAttention"] = self._call(gated_flex(query, key, value, log_beta, scaling), tensors)
        else:
            absent["FlexAttention"] = f"is compiled for T={FLEX_LENGTH} only"
        ours = self._call(lambda: gated_attention(*tensors, scaling, rows, "triton"), tensors)
        return Sides(ours, peers, absent)

    def small(self, interpreted: bool) -> GatedAttention:
        return replace(self, seq_len=37, heads=TINY) if interpreted else replace(self, seq_len=656, heads=CARD)

    def error(self, device: str) -> float:
        tensors, scaling = self.inputs(device), self.heads.dim**-0.5
        rows = Segments.whole(1, self.seq_len, device)
        exact = tuple(x.detach().double().requires_grad_(self.backward) for x in tensors)
        twin: Callable[..., torch.Tensor] = naive.gated_attention
        ours = self._call(lambda: gated_attention(*tensors, scaling, rows, "triton"), tensors)()
        truth = self._call(lambda: twin(*exact, scaling, rows), exact)()
        if not self.backward:
            return relative_error(ours, truth)
        return max(relative_error(one, other) for one, other in zip(ours, truth, strict=True))


@dataclass(frozen=True)
class Occupancy(KernelBenchCase):
    """Occupancy of all layers, at every position or, as in training, at `samples` of them."""

    model: str
    seq_len: int
    samples: int | None = None
    backward: bool = False
    layers: int = 0
    kv_heads: int = FULL.kv

    kernel: ClassVar[str] = "occupancy"
    tolerance: ClassVar[float] = 1e-5

    @property
    def shape(self) -> str:
        where = "everywhere" if self.samples is None else f"at {self.samples} positions"
        way = "forward and backward" if self.backward else "forward"
        return f"{self.model}, T={self.seq_len}, {where}, {way}"

    @property
    def rows(self) -> int:
        return (self.layers or LAYERS[self.model]) * self.kv_heads

    def work(self) -> Work:
        times = 2 if self.backward else 1
        if self.samples is None:
            terms, memory = self.seq_len**2 / 2, 8 * self.seq_len
        else:
            terms, memory = self.samples * self.seq_len, 4 * (self.seq_len + self.samples)
        return Work(times * self.rows * memory, exponentials=times * self.rows * terms)

    def memory(self) -> float:
        return 6 * FP32 * self.rows * self.seq_len

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None, Segments, torch.Tensor]:
        """log β, the chosen positions, rows, and the weight of the output."""
        layers = self.rows // self.kv_heads
        log_beta = log_betas(device, layers, 1, self.kv_heads, self.seq_len).requires_grad_(self.backward)
        index = None
        if self.samples is not None:
            index = torch.linspace(0, self.seq_len - 1, self.samples, device=device).long().view(1, -1)
        width = self.seq_len if self.samples is None else self.samples
        weight = normal(device, layers, 1, self.kv_heads, width, dtype=torch.float32)
        return log_beta, index, Segments.whole(1, self.seq_len, device), weight

    def sides(self, device: str) -> Sides:
        log_beta, index, rows, weight = self.inputs(device)

        def run(kernels: str) -> Call:
            def forward() -> torch.Tensor:
                if index is None:
                    return occupancy(log_beta, rows, kernels)  # type: ignore[arg-type]
                return occupancy_at(log_beta, index, rows, kernels)  # type: ignore[arg-type]

            return with_gradients(forward, (log_beta,), weight) if self.backward else forward

        if self.samples is None and self.seq_len > TWIN_LENGTH:
            return Sides(run("triton"), absent={"twin": "goes through a hundred thousand tiles one by one"})
        return Sides(run("triton"), {"twin": run("reference")})

    def small(self, interpreted: bool) -> Occupancy:
        samples = self.samples and (5 if interpreted else self.samples)
        length, heads = (37, 1) if interpreted else (656, self.kv_heads)
        return replace(self, model="check", seq_len=length, samples=samples, layers=2, kv_heads=heads)

    def error(self, device: str) -> float:
        log_beta, index, rows, weight = self.inputs(device)
        exact = log_beta.detach().double().requires_grad_(self.backward)
        truth = naive.occupancy(exact, rows)
        if index is not None:
            truth = truth.gather(-1, index.expand(*truth.shape[:-1], -1))
        ours = occupancy(log_beta, rows, "triton") if index is None else occupancy_at(log_beta, index, rows, "triton")
        worst = relative_error(ours.detach(), truth.detach())
        if self.backward:
            (own,) = torch.autograd.grad(ours, log_beta, weight)
            (expected,) = torch.autograd.grad(truth, exact, weight.double())
            worst = max(worst, relative_error(own, expected))
        return worst
