"""Batches made ahead in a thread."""

from __future__ import annotations

import threading

import pytest
import torch

from tenure.training import Batch
from tenure.training.batches_ahead import BatchesAhead


def test_batches_come_in_order_and_one_is_made_ahead() -> None:
    made: list[tuple[int, str]] = []
    second = threading.Event()

    def make(first: int) -> Batch:
        made.append((first, threading.current_thread().name))
        if first == 4:
            second.set()
        if first == 8:
            raise OSError("no such example")
        ids = torch.full((1, 2), first)
        return Batch(ids, ids, None, ids > 0)

    batches = BatchesAhead(make)
    assert int(batches.get(0, 4).input_ids[0, 0]) == 0
    assert second.wait(10), "the next batch is made while nobody asks for it"
    assert int(batches.get(4, 8).input_ids[0, 0]) == 4
    with pytest.raises(OSError, match="no such example"):
        batches.get(8, 12)
    assert int(batches.get(20, None).input_ids[0, 0]) == 20, "a resumed run may begin anywhere"
    batches.close()
    assert [first for first, _ in made] == [0, 4, 8, 20]
    assert all(name.startswith("batches") for _, name in made)
