"""Blocks of page-locked memory, and a pool whose copies are made of them."""

from __future__ import annotations

import random

import pytest
import torch

from tenure.eviction.storage.packing import as_one
from tenure.serving import ArenaConfig, MemoryPool, TensorPayload
from tenure.serving.kvcache import memory_pool
from tenure.serving.kvcache.memory_pool import PinnedArena

UNIT = 512
CONFIG = ArenaConfig(block_bytes=UNIT, slab_bytes=64 * UNIT)


@pytest.fixture
def slabs(monkeypatch) -> list[int]:
    """The sizes of slabs as they are locked, here in ordinary memory."""
    made: list[int] = []
    monkeypatch.setattr(memory_pool, "page_locked", lambda nbytes: made.append(nbytes) or memory(nbytes))
    return made


def memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_blocks_do_not_overlap_and_are_freed(slabs):
    """Random sizes and lifetimes: the contents of a block never change, and all memory is free at the end."""
    source, place = random.Random(0), PinnedArena(300 * UNIT, memory_pool.page_locked, CONFIG)
    blocks: list[tuple[torch.Tensor, int]] = []
    refused = 0
    for number in range(3000):
        if blocks and source.random() < 0.48:
            gone = blocks.pop(source.randrange(len(blocks)))
            assert bool((gone[0] == gone[1]).all())
            del gone
            continue
        nbytes = source.choice([1, UNIT, UNIT + 1, 5 * UNIT, source.randrange(1, 40 * UNIT)])
        try:
            block = place.block(nbytes)
        except MemoryError:
            refused += 1
            continue
        assert block.shape == (nbytes,) and block.dtype == torch.uint8
        tag = number % 256
        blocks.append((block.fill_(tag), tag))
        del block
        assert place.used >= sum(CONFIG.rounded(len(block)) for block, _ in blocks) and place.used <= place.capacity
    assert refused and place.locked == sum(slabs) <= 300 * UNIT * 5 // 4 + 64 * UNIT
    assert all(size & (size - 1) == 0 for size in slabs)
    blocks.clear()
    whole = place.block(64 * UNIT)
    assert place.used == len(whole) and [size for size, _ in place._free._sizes] == sorted(slabs)[:-1]


def test_a_block_is_free_when_its_last_view_is_gone(slabs):
    place = PinnedArena(4 * UNIT, memory_pool.page_locked, CONFIG)
    view = place.block(4 * UNIT)[10:20].view(2, 5)
    with pytest.raises(MemoryError, match="512 bytes are asked for, 0 are free"):
        place.block(1)
    del view
    assert place.block(4 * UNIT).shape == (4 * UNIT,)


def test_fragmentation_is_compensated_by_a_quarter_more(slabs):
    place = PinnedArena(64 * UNIT, memory_pool.page_locked, CONFIG)
    blocks = [place.block(UNIT) for _ in range(64)]
    del blocks[:16:2]
    kept = [place.block(2 * UNIT) for _ in range(4)]
    assert place.used == 64 * UNIT < place.locked <= 80 * UNIT and len(kept) + len(blocks) == 60


def test_a_block_larger_than_a_slab(slabs):
    place = PinnedArena(1000 * UNIT, memory_pool.page_locked, CONFIG)
    assert place.block(200 * UNIT).shape == (200 * UNIT,) and slabs == [256 * UNIT]


def filled(tokens: int) -> TensorPayload:
    generator = torch.Generator().manual_seed(tokens)
    return TensorPayload(
        {
            f"layers.{layer}.{name}": torch.randn(1, 2, tokens, dim, generator=generator).to(dtype)
            for layer in range(3)
            for name, dim, dtype in (("key", 4, torch.bfloat16), ("value", 4, torch.bfloat16), ("beta", 1, torch.float))
        },
        tokens,
    )


def through(pool: MemoryPool, payload: TensorPayload) -> TensorPayload:
    builder = pool.new_builder(payload)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    made = builder.commit()
    assert isinstance(made, TensorPayload)
    return made


def blocks(payload: TensorPayload) -> list[torch.Tensor]:
    found = [as_one(list(payload.read(layer).values())) for layer in range(len(payload.layers))]
    return [block for block in found if block is not None]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_layer_is_one_block_also_when_it_is_split_and_joined(slabs, pinned):
    pool, source = MemoryPool(10**5, pinned=pinned), filled(11)
    copy = through(pool, source)
    head, tail = copy.split(4)
    whole = head.join(tail)
    assert whole is not None
    for payload in (copy, head, tail, whole):
        assert [len(block) for block in blocks(payload)] == list(payload.layers)
    for name, tensor in source.tensors.items():
        assert torch.equal(copy.tensors[name], tensor) and torch.equal(whole.tensors[name], tensor)
        assert torch.equal(tail.tensors[name], tensor[:, :, 4:])
    if pinned:
        used = sum(CONFIG.rounded(size) for payload in (copy, head, tail, whole) for size in payload.layers)
        assert pool._arena is not None and pool._arena.used == used
        assert used == sum(map(pool.charge, (copy, head, tail, whole)))


def test_a_copy_is_one_copy_a_layer(slabs, monkeypatch):
    first = through(MemoryPool(10**5), filled(9))
    copies, real = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda one, *rest, **how: copies.append(one) or real(one, *rest, **how))
    second = through(MemoryPool(10**5, pinned=True, arena=CONFIG), first)
    assert len(copies) == 3
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())


def test_a_full_pool_can_still_split_a_copy(slabs):
    source = filled(16)
    pool = MemoryPool(sum(map(CONFIG.rounded, source.layers)), pinned=True, arena=CONFIG)
    copy = through(pool, source)
    with pytest.raises(MemoryError):
        pool.new_builder(source)
    for half, part in zip(copy.split(8), (slice(0, 8), slice(8, 16)), strict=True):
        assert all(torch.equal(half.tensors[name], one[:, :, part]) for name, one in source.tensors.items())
        assert len(blocks(half)) == 3
