"""A row of the GPU benchmark: a kernel at a shape, its checking twin, its peers, and its lower bound of work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

MICRO = 1e6
Call = Callable[[], Any]


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and numbers of a head."""

    query: int = 32
    kv: int = 8
    dim: int = 128

    @property
    def group(self) -> int:
        return self.query // self.kv


FULL = Heads()  # of a layer of Qwen3-4B and of Llama-3.1-8B
CARD = Heads(8, 2, 128)  # for checks on a card: the group and the dimension of FULL, so the same compiled kernels
TINY = Heads(2, 1, 16)  # for checks in the interpreter
LAYERS = {"Qwen3-4B": 36, "Llama-3.1-8B": 32}
HIDDEN = {"Qwen3-4B": 2560, "Llama-3.1-8B": 4096}


@dataclass(frozen=True)
class Ceilings:
    """The most that a card does in a second, of its data sheet or measured.

    Attributes:
        name: whose.
        memory: bytes/s read and written.
        products: operations/s of bf16 matrix products.
        exponentials: of fp32 numbers.
        to_host, to_device: bytes/s to and from pinned memory.
    """

    name: str
    memory: float
    products: float
    exponentials: float
    to_host: float
    to_device: float


# The numbers of docs/results/kernels.md; the link is PCIe 5.0 with 16 lanes.
H100 = Ceilings("H100 SXM, data sheet", 3.35e12, 989e12, 132 * 16 * 1.83e9, 64e9, 64e9)


@dataclass(frozen=True)
class Work:
    """Lower bound of one call's work: bytes of memory, operations, exponentials, bytes over the link."""

    memory: float
    products: float = 0.0
    exponentials: float = 0.0
    to_host: float = 0.0

    def bound_us(self, ceilings: Ceilings) -> float:
        """Microseconds of the slowest of the four, each at its ceiling."""
        return MICRO * max(getattr(self, name) / getattr(ceilings, name) for name in vars(self))


@dataclass(frozen=True)
class Sides:
    """The calls to time at one shape; all memory is allocated.

    Attributes:
        ours: the kernel.
        peers: by name, what it is compared with; `twin` is the plain form of the same operation.
        absent: peers that are not timed at this shape, and why.
        reset: puts back what `ours` and the peers change; not timed.
    """

    ours: Call
    peers: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    reset: Call | None = None


class KernelBenchCase(ABC):
    """One kernel at one shape: a frozen dataclass of sizes.

    Attributes:
        kernel: what the table calls it.
        tolerance: the greatest error of a check, relative in norm; 0 for bit-equal.
    """

    kernel: ClassVar[str]
    tolerance: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def shape(self) -> str:
        """The sizes in words, e.g. `N=32768, 20% kept`."""

    @abstractmethod
    def work(self) -> Work: ...

    @abstractmethod
    def memory(self) -> float:
        """Bytes of the card that inputs and kernel take, roughly; a peer may take more, and then is left out."""

    @abstractmethod
    def sides(self, device: str) -> Sides:
        """Allocates inputs on `device`."""

    @abstractmethod
    def small(self, interpreted: bool) -> KernelBenchCase:
        """The same launches at a size that can be checked: a few entries in the interpreter, some tiles on a card.

        On a card sizes are multiples of 16, as the timed ones are, but not of tiles: what is checked is what is timed.
        """

    @abstractmethod
    def error(self, device: str) -> float:
        """Error of the kernel against its twin, computed in float64 where applicable; called on `small` cases."""


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error of the norm; infinite if a value is not finite."""
    if not ours.isfinite().all():
        return float("inf")
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(device, seed), device=device, dtype=torch.float32).to(dtype)
