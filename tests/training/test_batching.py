"""Documents to packed rows, rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tenure.training.batching import PackedSource, collate, concatenate, first_fit
from tenure.training.data import Example


class Listed:
    """An epoch source over given lengths, its epochs rotated by their number."""

    def __init__(self, lengths: Sequence[int]):
        self.sizes = list(lengths)

    def __len__(self) -> int:
        return len(self.sizes)

    def _order(self, epoch: int) -> list[int]:
        shift = epoch % len(self.sizes)
        return [*range(shift, len(self.sizes)), *range(shift)]

    def epoch_lengths(self, epoch: int) -> list[int]:
        return [self.sizes[row] for row in self._order(epoch)]

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self.sizes))
        row = self._order(epoch)[place]
        size = self.sizes[row]
        return Example([100 * (row + 1) + position for position in range(size)], [True] * size, "raw")


def test_first_fit_keeps_order_and_capacity() -> None:
    assert first_fit([5, 6, 4, 3, 10, 1], 10) == [[0, 2, 5], [1, 3], [4]]
    lengths = [(7 * i) % 50 + 1 for i in range(2000)]
    rows = first_fit(lengths, 100)
    assert sorted(place for row in rows for place in row) == list(range(2000))
    assert all(sum(lengths[place] for place in row) <= 100 for row in rows)
    assert sum(lengths) / (100 * len(rows)) > 0.97


def test_packed_rows_hold_every_document_once_an_epoch() -> None:
    source = Listed([5, 6, 4, 3, 10, 1, 7])
    packed = PackedSource(source, 10)
    first = packed[0]
    assert first.input_ids == [100, 101, 102, 103, 104, 300, 301, 302, 303, 600]
    assert first.position_ids == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert first.loss_mask == [False, True, True, True, True, False, True, True, True, False]
    everything = sorted(token for row in range(7) for token in source[row].input_ids)
    start = 0
    for epoch in range(4):
        rows = packed.rows(epoch)
        assert sorted(token for row in range(rows) for token in packed[start + row].input_ids) == everything
        start += rows
    fresh = PackedSource(source, 10)
    assert [fresh[i] for i in (9, 0, 4)] == [packed[i] for i in (9, 0, 4)]


def test_packing_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="a document of 12 tokens does not fit into rows of 10"):
        PackedSource(Listed([3, 12]), 10)
    with pytest.raises(ValueError, match="list has no epochs to pack"):
        PackedSource([], 10)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: Any) -> None:
    batch = collate([Example([5, 6, 7], [True] * 3, "raw"), Example([8], [True], "raw")], 0, side)
    left = side == "left"
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8] if left else [8, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1] if left else [1, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [False] * 3]
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool


def test_batch_of_one_length_has_no_mask() -> None:
    batch = collate([Example([5, 6], [False, True], "raw"), Example([7, 8], [False, True], "raw")], 0)
    assert batch.attention_mask is None and batch.to("cpu").attention_mask is None


def test_packed_batch_has_no_mask_and_padding_apart() -> None:
    packed = concatenate([Example([5, 6, 7], [True] * 3, "raw"), Example([8, 9], [True] * 2, "raw")])
    batch = collate([packed, Example([4, 4], [False, True], "raw")], 0)
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]


def test_packed_documents_give_what_each_gives_alone(tiny_llama: Any) -> None:
    documents = [Example(list(range(10, 10 + size)), [True] * size, "raw") for size in (9, 5, 7)]
    batch = collate([concatenate(documents), documents[0]], 0)
    with torch.no_grad():
        logits = tiny_llama(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        alone = [tiny_llama(input_ids=torch.tensor([document.input_ids])).logits[0] for document in documents]
    torch.testing.assert_close(logits[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1, :9], alone[0], rtol=1e-5, atol=1e-5)


def test_collate_refuses() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate([], 0)
    with pytest.raises(ValueError, match="without tokens"):
        collate([Example([], [], "raw")], 0)
    with pytest.raises(ValueError, match="'left' or 'right', got 'top'"):
        collate([Example([1], [False], "raw")], 0, "top")  # pyright: ignore[reportArgumentType]
