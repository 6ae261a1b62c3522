"""Where kernels run in tests, and segments in pages whose free slots hold NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tenure.eviction.ops.naive import entry_slots, owned_pages
from tenure.retention.ops.kernel_choice import interpreting


@pytest.fixture(scope="session")
def device() -> str:
    """The interpreter runs on the CPU; compiled kernels need a GPU."""
    return "cpu" if interpreting() else "cuda"


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of the test runs as a Triton kernel."""
    monkeypatch.setenv("TENURE_KERNELS", "triton")


@dataclass
class Segments:
    """Pages of some segments, all of them free at first and full of NaN."""

    key_pages: torch.Tensor
    value_pages: torch.Tensor
    position_pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    free: torch.Tensor
    counters: torch.Tensor

    @property
    def size(self) -> int:
        return self.key_pages.shape[1]

    def tensors(self) -> Any:
        """As the operations take them, in this order."""
        return tuple(vars(self).values())

    def copy(self) -> Segments:
        return Segments(*(tensor.clone() for tensor in self.tensors()))

    def slots(self, segment: int) -> torch.Tensor:
        return entry_slots(self.table[segment], 0, int(self.lengths[segment]), self.size)

    def entries(self, segment: int, pages: torch.Tensor) -> torch.Tensor:
        """The entries of a segment in one of the buffers, in order."""
        return pages.flatten(0, 1)[self.slots(segment)]

    def check(self) -> None:
        """Owned and free pages are all that there are, and nothing is owned twice."""
        rows = zip(self.lengths.tolist(), self.table.tolist(), strict=True)
        owned = [page for n, row in rows for page in row[: owned_pages(n, self.size)]]
        free = self.free[: int(self.counters[0])].tolist()
        assert sorted(owned + free) == list(range(len(self.free)))


@pytest.fixture
def empty_segments(device: str) -> Callable[..., Segments]:
    """Makes `Segments`; the stack of free pages is in no order."""

    def make(
        segments: int, num_pages: int, size: int, key_dim: int, value_dim: int, dtype=torch.float32, width: int = 16
    ) -> Segments:
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(num_pages))
        integers = {"dtype": torch.int32, "device": device}
        return Segments(
            torch.full((num_pages, size, key_dim), torch.nan, dtype=dtype, device=device),
            torch.full((num_pages, size, value_dim), torch.nan, dtype=dtype, device=device),
            torch.full((num_pages, size), -7, **integers),
            torch.full((segments, width), 2**30, **integers),  # stale entries must not be followed
            torch.zeros(segments, **integers),
            order.to(**integers),
            torch.tensor([num_pages, 0], **integers),
        )

    return make


@pytest.fixture
def filled_segments(empty_segments, device) -> Callable[..., Segments]:
    """Segments of given lengths with random entries; everything else is NaN."""

    def make(lengths: list[int], size: int, key_dim: int, value_dim: int, dtype=torch.float32) -> Segments:
        owned = [owned_pages(n, size) for n in lengths]
        width = max(1, *owned)
        made = empty_segments(len(lengths), sum(owned) + 2, size, key_dim, value_dim, dtype, width)
        generator = torch.Generator().manual_seed(sum(lengths))
        top = len(made.free)
        for segment, (n, count) in enumerate(zip(lengths, owned, strict=True)):
            made.table[segment, :count] = made.free[top - count : top]
            top -= count
            made.lengths[segment] = n
            for pages in (made.key_pages, made.value_pages):
                new = torch.randn(n, pages.shape[2], generator=generator)
                pages.flatten(0, 1)[made.slots(segment)] = new.to(device=device, dtype=dtype)
        made.counters[0] = top
        made.check()
        return made

    return make
