"""Bytes counted by pools, and payloads without data."""

from __future__ import annotations

import pytest
import torch

from tenure.serving import (
    LRU,
    MemoryPool,
    PhantomPayload,
    TensorPayload,
    Tier,
    TieredCache,
    TierPolicy,
    VirtualClock,
    VirtualTransfer,
)
from tenure.serving.kvcache import memory_pool


def test_pinned_memory_is_charged_in_blocks(monkeypatch):
    monkeypatch.setattr(memory_pool, "page_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    tensors = {"0.k": torch.zeros(3, dtype=torch.int8), "0.v": torch.zeros(5), "1.v": torch.zeros(256)}
    payload = TensorPayload(tensors, 1, None)
    assert MemoryPool(100, pinned=True).charge(payload) == 512 + 1024
    assert MemoryPool(100).charge(payload) == payload.nbytes == 23 + 1024


def test_wrong_arguments_are_reported():
    clock = VirtualClock()
    with pytest.raises(ValueError, match=r"a pool for Tier\.DEVICE is needed"):
        TieredCache({Tier.HOST: MemoryPool(1)}, VirtualTransfer(clock, {}), TierPolicy(LRU()), 2, clock)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="pinned=True needs a GPU that torch sees"):
            MemoryPool(10, pinned=True)
    with pytest.raises(ValueError, match="a capacity of -1 bytes; accepted: 0"):
        MemoryPool(-1)


def test_phantoms_divide_their_bytes():
    whole = PhantomPayload(10, 1003, num_layers=4)
    head, tail = whole.split(3)
    assert (head.tokens, tail.tokens, head.nbytes + tail.nbytes) == (3, 7, 1003)
    assert sum(whole.layers) == 1003 and len(whole.layers) == 4
    assert (joined := head.join(tail)) is not None and joined.nbytes == 1003
    assert whole.join(PhantomPayload(1, 1, divisible=False)) is None
