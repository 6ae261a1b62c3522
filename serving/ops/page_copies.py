"""A node's pages of one layer into one contiguous buffer, and back: one launch, whatever the layer is made of.

A transfer between tiers then is one copy a layer, of exactly the bytes that the node has, and runs at the speed of the
link: keys, values, positions and states of hundreds of pages would each be a copy of a few kilobytes. The contiguous
buffer is a slice of a staging buffer of the device, from or to which a side stream copies pinned memory.

The buffer holds the pages of the first tensor in the order of their ids, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels
from ...retention.ops.triton_language import jit, tl
from . import naive

WORD = 4  # bytes that are copied as one number
BLOCK = 2048  # words of a program


@jit
def copy_pages(tensors, ids, buffer, count, WORDS: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (pages, parts of the largest page): copies a part of one page of every tensor.

    `WORDS` are the words of a page in each of `tensors`, all seen as int32.
    """
    number = tl.program_id(0)
    page = tl.load(ids + number).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.zeros([1], tl.int64)
    for i in tl.static_range(len(WORDS)):
        inside = word < WORDS[i]
        apart = tensors[i] + page * WORDS[i] + word
        together = buffer + begin + number.to(tl.int64) * WORDS[i] + word
        if GATHER:
            tl.store(together, tl.load(apart, mask=inside, other=0), mask=inside)
        else:
            tl.store(apart, tl.load(together, mask=inside, other=0), mask=inside)
        begin += tl.full([1], WORDS[i], tl.int64) * count


def _launch(pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
    words = tuple(one[0].nbytes // WORD if len(one) else 0 for one in pages)
    count = ids.shape[0]
    if count and max(words, default=0):
        copy_pages[(count, -(-max(words) // BLOCK))](
            tuple(_as_words(one) for one in pages), ids, _as_words(buffer), count, WORDS=words, GATHER=gather,
            BLOCK=BLOCK, num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.int32)


@torch.library.custom_op("tenure::gather_pages", mutates_args=("buffer",))
def _gather_pages(pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor) -> None:
    if chosen_kernels(buffer.device) == "triton":
        return _launch(pages, ids, buffer, gather=True)
    naive.gather_pages(pages, ids, buffer)


@torch.library.custom_op("tenure::scatter_pages", mutates_args=("pages",))
def _scatter_pages(buffer: torch.Tensor, ids: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
    if chosen_kernels(buffer.device) == "triton":
        return _launch(pages, ids, buffer, gather=False)
    naive.scatter_pages(buffer, ids, pages)


for _op in (_gather_pages, _scatter_pages):
    _op.register_fake(lambda *arguments: None)


def staging_bytes(pages: Sequence[torch.Tensor], count: int) -> int:
    """Bytes that `count` pages of each of these tensors take."""
    return count * sum(one.stride(0) * one.element_size() for one in pages)


def gather_pages(pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copies the pages `ids` of every tensor into `buffer`. No host sync; runs on the current stream.

    Args:
        pages: each `(num_pages, ...)`, contiguous, on one device, of any dtypes; pages of whole 4-byte words.
        ids: int32 `(count,)`, each below `num_pages`.
        buffer: uint8 `(staging_bytes(pages, count),)` on the same device, aligned to 4 bytes.

    Raises:
        ValueError: another dtype or size, or pages that are not whole words.
    """
    _check(pages, ids, buffer)
    _gather_pages(list(pages), ids, buffer)


def scatter_pages(buffer: torch.Tensor, ids: torch.Tensor, pages: Sequence[torch.Tensor]) -> None:
    """Copies what `gather_pages` has made of as many pages of the same kinds into the pages `ids`, all different.

    Args, raises: as `gather_pages`.
    """
    _check(pages, ids, buffer)
    _scatter_pages(buffer, ids, list(pages))


def _check(pages: Sequence[torch.Tensor], ids: torch.Tensor, buffer: torch.Tensor) -> None:
    if not pages or not all(one.is_contiguous() and one.device == buffer.device for one in pages):
        raise ValueError(
            f"got {len(pages)} tensors of pages, some with gaps or on another device than {buffer.device}; accepted: "
            "one or more contiguous ones, on the buffer's device"
        )
    odd = [tuple(one.shape) for one in pages if one.stride(0) * one.element_size() % WORD]
    if odd or buffer.storage_offset() % WORD:
        raise ValueError(f"got pages {odd} of a part of a word, or a buffer in the midst of one; accepted: whole words")
    wanted = staging_bytes(pages, ids.shape[0])
    if ids.dtype != torch.int32 or ids.ndim != 1 or buffer.dtype != torch.uint8 or buffer.shape != (wanted,):
        raise ValueError(
            f"got ids {ids.dtype} {tuple(ids.shape)} and a buffer {buffer.dtype} {tuple(buffer.shape)}; accepted: "
            f"torch.int32 (count,) and torch.uint8 ({wanted},)"
        )
