"""Ragged decode attention against plain softmax in fp64, over pages whose free slots hold NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction.ops import naive, paged_attention
from tenure.eviction.ops.paged_attention import ragged_decode, ragged_decode_part
from tenure.retention.ops.kernel_choice import interpreting
from tenure.retention.ops.softmax import Softmax

pytestmark = pytest.mark.usefixtures("nan_outputs")  # also of what is kept between two kernels
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def queries(batch: int, heads: int, q_len: int, dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """As a model gives them: a view of `(batch, q_len, heads, dim)`."""
    generator = torch.Generator().manual_seed(q_len)
    return torch.randn(batch, q_len, heads, dim, generator=generator).to(device=device, dtype=dtype).transpose(1, 2)


def in_double(query, pages, scaling, hidden=None):
    key, value = pages.key_pages.double(), pages.value_pages.double()
    return naive.ragged_decode(query.double(), key, value, pages.table, pages.lengths, hidden, scaling)[0]


CASES = [
    # batch, kv heads, group, q_len, key and value dim, page size, lengths, dtype
    (1, 2, 2, 1, 8, 8, 16, [0, 0], torch.float32),
    (1, 2, 1, 1, 8, 8, 16, [16, 15], torch.float32),
    (2, 2, 3, 1, 8, 5, 32, [0, 17, 300, 1], torch.float32),
    (2, 1, 3, 5, 20, 8, 16, [5, 129], torch.float32),
    (1, 3, 1, 2, 16, 16, 64, [64, 2, 257], torch.float16),
    (1, 1, 4, 1, 64, 64, 128, [129], torch.bfloat16),
    (1, 2, 4, 7, 16, 16, 16, [100, 33], torch.bfloat16),
    (1, 1, 5, 16, 8, 8, 16, [41], torch.float32),  # more rows than a tile has
]


@pytest.mark.parametrize(("batch", "heads", "group", "q_len", "dim", "value_dim", "size", "lengths", "dtype"), CASES)
def test_decode_equals_softmax(
    batch, heads, group, q_len, dim, value_dim, size, lengths, dtype, filled_segments, device, triton_kernels
):
    pages = filled_segments(lengths, size, dim, value_dim, dtype)
    query = queries(batch, heads * group, q_len, dim, dtype, device)
    got = ragged_decode(query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 0.3)
    assert got.shape == (batch, q_len, heads * group, value_dim) and got.dtype == dtype
    expected = in_double(query, pages, 0.3)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for segment, length in enumerate(lengths):
        if length == 0:
            row, head = divmod(segment, heads)
            assert not got[row, :, head * group : (head + 1) * group].any()


def test_padding_gives_zeros_and_hides_the_right_entries(filled_segments, device, triton_kernels):
    pages = filled_segments([40, 3, 70, 18], 16, 8, 8)
    query = queries(2, 4, 4, 8, torch.float32, device)
    hidden = torch.tensor([[-1, 1, -1, 0], [-1, -1, -1, -1]], dtype=torch.int32, device=device)
    got = ragged_decode(query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 0.3, hidden)
    torch.testing.assert_close(got.double(), in_double(query, pages, 0.3, hidden), atol=2e-6, rtol=2e-6)
    assert not got[0, 0].any() and not got[0, 2].any() and not got[1].any() and got[0, 3].all()


def with_sink_entries(query, pages, scaling, softcap, sinks):
    """An oracle in fp64 that knows nothing of the twin: every segment gets one more entry, whose value is zero."""
    batch, num_heads, q_len, _ = query.shape
    heads = len(pages.lengths) // batch
    group = num_heads // heads
    out, log_sums = [], []
    for row in range(batch):
        for head in range(num_heads):
            segment = row * heads + head // group
            key, value = (pages.entries(segment, each).double() for each in (pages.key_pages, pages.value_pages))
            logits = query[row, head].double() @ key.T * scaling
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            newer = torch.arange(len(key)) >= len(key) - q_len + 1 + torch.arange(q_len)[:, None]
            logits = logits.masked_fill(newer.to(logits.device), -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().expand(q_len, 1)], 1)
                value = torch.cat([value, value.new_zeros(1, value.shape[1])])
            out.append(logits.softmax(1).nan_to_num(0.0) @ value)
            log_sums.append(logits.logsumexp(1))
    shape = batch, num_heads, q_len
    return torch.stack(out).view(*shape, -1).transpose(1, 2), torch.stack(log_sums).view(shape).transpose(1, 2)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "case"), [(2.0, False, 3), (None, True, 3), (2.0, True, 2), (2.0, True, 6)]
)
def test_capped_logits_and_sinks(softcap, with_sinks, case, kernels, filled_segments, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    monkeypatch.setattr(paged_attention, "PROGRAMS", 2)  # each costs the interpreter milliseconds
    batch, heads, group, q_len, dim, value_dim, size, lengths, dtype = CASES[case]
    pages = filled_segments(lengths, size, dim, value_dim, dtype)
    query = queries(batch, heads * group, q_len, dim, dtype, device)
    sinks = torch.linspace(-4.0, 6.0, heads * group, device=device, dtype=dtype) if with_sinks else None
    given = query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 0.7
    got, log_sum = ragged_decode_part(*given, softmax=Softmax(softcap, sinks))
    expected, expected_log_sum = with_sink_entries(query, pages, 0.7, softcap, sinks)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(log_sum.double(), expected_log_sum, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(in_double(query, pages, 0.7), expected, atol=0.1), "the ordinary softmax is another"


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_the_result_does_not_depend_on_how_entries_are_shared_out(programs, filled_segments, device, monkeypatch):
    """One program for all, and pieces of a block each, of which a long segment has many."""
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    monkeypatch.setattr(paged_attention, "PROGRAMS", programs)
    monkeypatch.setattr(paged_attention, "_multiprocessors", lambda index: programs)
    pages = filled_segments([1300, 1, 64, 0], 16, 8, 8)
    query = queries(1, 4, 1, 8, torch.float32, device)
    got = ragged_decode(query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 0.3)
    torch.testing.assert_close(got.double(), in_double(query, pages, 0.3), atol=2e-6, rtol=2e-6)


def test_a_context_of_128k_tokens_in_as_many_pieces_as_a_card_takes(filled_segments, device, monkeypatch):
    """Beside a head that has kept next to nothing: nearly all programs go to the long one, and are merged."""
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    monkeypatch.setattr(paged_attention, "PROGRAMS", paged_attention.WAVES * 132)
    if interpreting():  # each block costs it milliseconds
        wide = {"ROWS": 16, "BLOCK": 512, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(paged_attention, "tile_sizes", lambda *shape: wide)
    pages = filled_segments([131072, 3], 128, 8, 8, torch.bfloat16)
    query = queries(1, 2, 1, 8, torch.bfloat16, device)
    got = ragged_decode(query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 3.0)
    torch.testing.assert_close(got.double(), in_double(query, pages, 3.0), atol=1e-3, rtol=2e-2)


def test_large_logits_do_not_overflow(filled_segments, device, triton_kernels):
    pages = filled_segments([50], 16, 8, 8)
    query = queries(1, 1, 1, 8, torch.float32, device) * 1000
    got = ragged_decode(query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, 1.0)
    torch.testing.assert_close(got.double(), in_double(query, pages, 1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(interpreting(), reason="the interpreter has no CUDA graphs")
def test_a_replayed_graph_follows_lengths_and_tables(filled_segments, device, triton_kernels):
    """Captured once over short segments; then the segments are others."""
    pages, longer = filled_segments([5, 0, 40, 3], 16, 64, 64), filled_segments([300, 17, 0, 129], 16, 64, 64)
    held: Any = [torch.zeros_like(one) for one in (longer.key_pages, longer.value_pages, longer.table, longer.lengths)]
    query = queries(2, 8, 1, 64, torch.float32, device)
    ragged_decode(query, *held, scaling=0.3)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ragged_decode(query, *held, scaling=0.3)
    for segments in (pages, longer):
        given = (segments.key_pages, segments.value_pages, segments.table, segments.lengths)
        for one, new in zip(held, given, strict=True):
            one[tuple(slice(0, size) for size in new.shape)] = new
        graph.replay()
        torch.testing.assert_close(out.double(), in_double(query, segments, 0.3), atol=2e-6, rtol=2e-6)


def test_wrong_inputs_are_named(filled_segments, device):
    pages = filled_segments([5, 5], 16, 8, 8)
    given: Any = [pages.key_pages, pages.value_pages, pages.table, pages.lengths, 0.3]
    query = queries(1, 2, 1, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"of torch.bfloat16, torch.float32; accepted: one of torch.float16"):
        ragged_decode(query.bfloat16(), *given)
    with pytest.raises(ValueError, match=r"head dimensions \(4, 8, 8\).*pages of 16 entries"):
        ragged_decode(query[..., :4], *given)
    with pytest.raises(ValueError, match=r"queries \(1, 3, 1, 8\) for 2 segments"):
        ragged_decode(queries(1, 3, 1, 8, torch.float32, device), *given)
    with pytest.raises(ValueError, match=r"got sinks \(3,\); accepted: \(2,\), one a query head"):
        ragged_decode(query, *given, softmax=Softmax(sinks=torch.zeros(3, device=device)))
    with pytest.raises(ValueError, match=r"lengths torch.int64 \(2,\).*accepted: contiguous torch.int32"):
        ragged_decode(query, given[0], given[1], given[2], pages.lengths.long(), scaling=0.3)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded, kernels, filled_segments, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    pages = filled_segments([5, 20], 16, 8, 4)
    query = queries(1, 4, 2, 8, torch.float32, device)
    hidden = torch.tensor([[-1, 0]], dtype=torch.int32, device=device) if padded else None
    sinks = torch.zeros(4, device=device) if padded else None
    arguments = (query, pages.key_pages, pages.value_pages, pages.table, pages.lengths, hidden, 0.3, sinks, 5.0)
    torch.library.opcheck(torch.ops.tenure.ragged_decode.default, arguments)
