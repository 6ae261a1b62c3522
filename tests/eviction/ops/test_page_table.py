"""Appending, compacting and releasing pages against plain loops, step by step."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops import naive
from tenure.eviction.ops.page_table import append_entries, move_entries, release_pages, write_state

pytestmark = pytest.mark.usefixtures("nan_outputs")  # also of what is kept between two kernels
BATCH, HEADS = 2, 3


def new_tokens(n: int, dims: tuple[int, int], dtype: torch.dtype, padded: bool, seed: int, device: str):
    """Keys as a view of a projection, values of their own, positions, ranks, counts and a state."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(BATCH, n, HEADS, dims[0], generator=generator).to(dtype).transpose(1, 2)
    value = torch.randn(BATCH, HEADS, n, dims[1], generator=generator).to(dtype)
    valid = torch.rand(BATCH, n, generator=generator) < (0.7 if padded else 2.0)
    rank = torch.where(valid, valid.cumsum(1) - 1, -1).int()
    position = torch.randint(0, 1000, (BATCH, n), generator=generator).int()
    added = valid.sum(1).repeat_interleave(HEADS).int()
    state = torch.randn(BATCH, HEADS, n, generator=generator)
    return tuple(tensor.to(device) for tensor in (key, value, position, rank, added, state))


@pytest.mark.parametrize(
    ("size", "dims", "dtype"),
    [
        (16, (5, 8), torch.float32),
        (32, (8, 3), torch.bfloat16),
        (64, (3, 4), torch.float32),
        (128, (16, 16), torch.float16),
    ],
)
def test_a_life_of_appends_and_evictions(size, dims, dtype, empty_segments, device, monkeypatch):
    """The kernels and the twins go through the same steps, and hold the same entries in the same pages."""
    mine = empty_segments(BATCH * HEADS, 2400 // size, size, *dims, dtype)
    yours = mine.copy()
    states = [torch.full(mine.position_pages.shape, torch.nan, device=device) for _ in range(2)]
    for step, n in enumerate([37, 1, 90, 1]):
        *tokens, state = new_tokens(n, dims, dtype, step % 2 == 0, step, device)
        keep = torch.rand(BATCH * HEADS, 400, generator=torch.Generator().manual_seed(step)) < 0.6
        keep[step % 6], keep[(step + 1) % 6] = False, True
        for kernels, side, pages in zip(("triton", "reference"), (mine, yours), states, strict=True):
            monkeypatch.setenv("TENURE_KERNELS", kernels)
            plan = append_entries(*tokens, *side.tensors())
            write_state(state, tokens[3], plan, side.table, pages)
            if step != 1:
                for buffer in (side.key_pages, side.value_pages, side.position_pages, pages):
                    move_entries(keep.to(device), side.lengths, side.table, buffer)
                stored = torch.arange(400, device=device) < side.lengths.unsqueeze(1)
                kept = (keep.to(device) & stored).sum(1).int()
                release_pages(side.lengths, kept, side.table, side.free, side.counters, size)
            side.check()
        assert torch.equal(mine.lengths, yours.lengths) and torch.equal(mine.counters, yours.counters)
        for segment in range(BATCH * HEADS):
            assert torch.equal(mine.slots(segment), yours.slots(segment))
            for one, other in zip((*mine.tensors()[:3], states[0]), (*yours.tensors()[:3], states[1]), strict=True):
                assert torch.equal(mine.entries(segment, one), yours.entries(segment, other))
        free = int(mine.counters[0])
        assert torch.equal(mine.free[:free], yours.free[:free])


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_the_newest_entries_are_where_they_were_put(kernels, empty_segments, device, monkeypatch):
    """Against the inputs themselves: the twin could be wrong in the same way."""
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    pages = empty_segments(BATCH * HEADS, 30, 16, 4, 6)
    key, value, position, rank, added, _ = new_tokens(17, (4, 6), torch.float32, True, 3, device)
    append_entries(key, value, position, rank, added, *pages.tensors())
    for segment in range(BATCH * HEADS):
        row, head = divmod(segment, HEADS)
        real = rank[row] >= 0
        assert torch.equal(pages.entries(segment, pages.key_pages), key[row, head, real])
        assert torch.equal(pages.entries(segment, pages.value_pages), value[row, head, real])
        assert torch.equal(pages.entries(segment, pages.position_pages), position[row, real])


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_too_few_pages_change_nothing_and_are_reported(kernels, empty_segments, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    pages = empty_segments(BATCH * HEADS, 7, 16, 4, 4)
    first = new_tokens(9, (4, 4), torch.float32, False, 0, device)
    append_entries(*first[:5], *pages.tensors())
    before = pages.copy()
    more = new_tokens(20, (4, 4), torch.float32, False, 1, device)
    plan = append_entries(*more[:5], *pages.tensors())
    state = torch.zeros(pages.position_pages.shape, device=device)
    write_state(more[5], more[3], plan, pages.table, state)
    assert pages.counters.tolist() == [1, 1] and not state.any()
    before.counters[1] = 1
    for one, other in zip(pages.tensors(), before.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_taking_back_returns_whole_pages_only(kernels, filled_segments, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    pages = filled_segments([40, 16, 17, 0], 16, 4, 4)
    shorter = torch.tensor([33, 0, 16, 5], dtype=torch.int32, device=device)
    release_pages(pages.lengths, shorter, pages.table, pages.free, pages.counters, 16)
    assert pages.lengths.tolist() == [33, 0, 16, 0]
    assert int(pages.counters[0]) == len(pages.free) - 4
    pages.check()


def test_wrong_inputs_are_named(empty_segments, device):
    tokens = new_tokens(2, (4, 4), torch.float32, False, 0, device)[:5]
    with pytest.raises(ValueError, match=r"a page size of 8; accepted: 16, 32, 64, 128"):
        append_entries(*tokens, *empty_segments(6, 4, 8, 4, 4).tensors())
    pages = empty_segments(6, 4, 16, 4, 4)
    pages.table = pages.table.long()
    with pytest.raises(ValueError, match=r"'table': 'torch.int64'.*accepted: torch.int32"):
        append_entries(*tokens, *pages.tensors())
    with pytest.raises(ValueError, match=r"for pages of torch.bfloat16"):
        append_entries(*tokens, *empty_segments(6, 4, 16, 4, 4, torch.bfloat16).tensors())
    with pytest.raises(ValueError, match=r"2 rows of 3 heads with \(4, 4\) numbers for 6 segments with \(5, 4\)"):
        append_entries(*tokens, *empty_segments(6, 4, 16, 5, 4).tensors())
    with pytest.raises(ValueError, match=r"2 rows of 3 heads .* for 4 segments.*accepted: batch \* num_kv_heads"):
        append_entries(*tokens, *empty_segments(4, 4, 16, 4, 4).tensors())
    pages = empty_segments(6, 4, 16, 4, 4)
    with pytest.raises(ValueError, match=r"got added torch.int64 \(6,\); accepted: added torch.int32 \(6,\)"):
        append_entries(*tokens[:4], tokens[4].long(), *pages.tensors())
    with pytest.raises(ValueError, match=r"got rank torch.int32 \(2, 1\); accepted: rank torch.int32 \(2, 2\)"):
        append_entries(*tokens[:3], tokens[3][:, 1:], tokens[4], *pages.tensors())


def test_wrong_inputs_of_what_follows_are_named(empty_segments, device):
    pages = empty_segments(6, 4, 16, 4, 4)
    *tokens, state = new_tokens(2, (4, 4), torch.float32, False, 0, device)
    plan, states = torch.zeros(2, 6, dtype=torch.int32, device=device), pages.position_pages.float()
    with pytest.raises(ValueError, match=r"a state got state torch.float64 \(2, 3, 2\); accepted: state torch.float32"):
        write_state(state.double(), tokens[3], plan, pages.table, states)
    with pytest.raises(ValueError, match=r"plan torch.int32 \(3, 6\); accepted: plan torch.int32 \(2, 6\)"):
        write_state(state, tokens[3], plan.new_zeros(3, 6), pages.table, states)
    keep = torch.ones(6, 5, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"compaction got keep torch.int64 \(6, 5\); accepted: keep torch.bool"):
        move_entries(keep.long(), pages.lengths, pages.table, pages.key_pages)
    with pytest.raises(ValueError, match="got pages, tables or counters with gaps; accepted: contiguous tensors"):
        move_entries(keep, pages.lengths, pages.table, pages.key_pages[..., 1:])
    with pytest.raises(ValueError, match=r"got shorter torch.int32 \(5,\); accepted: shorter torch.int32 \(6,\)"):
        release_pages(pages.lengths, pages.lengths[1:], pages.table, pages.free, pages.counters, 16)
    with pytest.raises(ValueError, match="a page size of 24; accepted: 16, 32, 64, 128"):
        release_pages(pages.lengths, pages.lengths.clone(), pages.table, pages.free, pages.counters, 24)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_opcheck(kernels, empty_segments, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    pages = empty_segments(BATCH * HEADS, 12, 16, 4, 4)
    *tokens, state = new_tokens(3, (4, 4), torch.float32, False, 0, device)
    for values in (pages.key_pages, pages.value_pages):
        torch.nan_to_num_(values)  # opcheck compares, NaN is not equal
    ops = torch.ops.tenure
    torch.library.opcheck(ops.append_entries.default, (*tokens, *pages.tensors()))
    plan = append_entries(*tokens, *pages.tensors())
    numbers = torch.zeros(pages.position_pages.shape, device=device)
    torch.library.opcheck(ops.write_state.default, (state, tokens[3], plan, pages.table, numbers))
    keep = torch.rand(BATCH * HEADS, 5, device=device) < 0.5
    torch.library.opcheck(ops.move_entries.default, (keep, pages.lengths, pages.table, pages.key_pages))
    shorter = pages.lengths - 2
    args = (pages.lengths, shorter, pages.table, pages.free, pages.counters, 16)
    torch.library.opcheck(ops.release_pages.default, args)


def test_ranks_of_padding_are_left_out_by_the_twin(empty_segments, device):
    """Left padding, as `generate` gives it."""
    pages = empty_segments(1, 3, 16, 2, 2)
    rank = torch.tensor([[-1, -1, 0, 1]], dtype=torch.int32, device=device)
    key = torch.arange(8.0, device=device).view(1, 1, 4, 2)
    plan = torch.empty(2, 1, dtype=torch.int32, device=device)
    added = torch.tensor([2], dtype=torch.int32, device=device)
    position = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32, device=device)
    naive.append_entries(key, key, position, rank, added, *pages.tensors(), plan=plan)
    assert pages.entries(0, pages.key_pages).tolist() == [[4.0, 5.0], [6.0, 7.0]]
