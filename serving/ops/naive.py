"""Plain-torch twins of the kernels: the reference in tests, and what runs without CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def gather_pages(pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor) -> None:
    """Same contract as `serving.ops.page_copies.gather_pages`."""
    for one, part in _parts(pages, ids, buffer):
        part.copy_(_as_bytes(one).index_select(0, ids))


def scatter_pages(buffer: torch.Tensor, ids: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
    """Same contract as `serving.ops.page_copies.scatter_pages`."""
    for one, part in _parts(pages, ids, buffer):
        _as_bytes(one).index_copy_(0, ids.long(), part)


def _parts(
    pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor with its part of the buffer, `(count, bytes of a page)`."""
    start = 0
    for one in pages:
        size = one.stride(0) * one.element_size()
        yield one, buffer[start : start + len(ids) * size].view(len(ids), size)
        start += len(ids) * size


def _as_bytes(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(len(pages), -1).view(torch.uint8)
