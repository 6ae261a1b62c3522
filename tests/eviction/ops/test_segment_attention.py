"""Attention over segments in C against its plain twin, and what decoding does where it cannot run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tenure.eviction import evict
from tenure.eviction.ops import c_kernels, naive, segment_attention
from tenure.eviction.storage import attention
from tenure.eviction.storage.page_lists import PageLists, RaggedPages
from tenure.eviction.storage.page_reads import ListReads
from tenure.retention.ops.softmax import ORDINARY, Softmax
from tenure.scripts.bench.tiny_models import Architecture

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def uncached():
    """Kernels are compiled anew in the test, and again after it."""
    c_kernels._library.cache_clear()
    c_kernels._kernel.cache_clear()
    yield
    c_kernels._library.cache_clear()
    c_kernels._kernel.cache_clear()


def attend(given, softmax: Softmax = ORDINARY) -> torch.Tensor:
    kernel = segment_attention.find_kernel(*given[:3], softmax=softmax)
    assert kernel is not None
    return segment_attention.segment_attention(kernel, *given, softmax=softmax)


def segments(lengths: list[int], batch: int, group: int, dims: tuple[int, int], dtype: torch.dtype):
    """Queries, keys and values of these segments, each followed by two free slots of NaN."""
    generator = torch.Generator().manual_seed(len(lengths))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0) + 2 * torch.arange(len(lengths))
    ends = starts + torch.tensor(lengths)
    query = (3 * torch.randn(batch, len(lengths) // batch, group, dims[0], generator=generator)).to(dtype)
    key, value = (torch.full((int(ends[-1]) + 2, dim), torch.nan, dtype=dtype) for dim in dims)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        for buffer in (key, value):
            buffer[start:end] = torch.randn(end - start, buffer.shape[1], generator=generator)
    return query, key, value, starts, ends, 0.3


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("group", "dims"), [(1, (8, 8)), (3, (64, 64)), (2, (16, 48)), (7, (32, 64)), (8, (96, 128)), (5, (80, 80))]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_segments_attend_like_their_twin(dtype, group, dims, threads):
    lengths = [1, 200, 63, 0, 64, 65 if threads == 1 else 4100]  # the many are divided between threads
    given = segments(lengths, 2, group, dims, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = attend(given)
    finally:
        torch.set_num_threads(before)
    assert got.dtype == dtype and not got[1, 0].any(), "an empty segment gives zeros"
    query, key, value, *bounds = given
    exact = naive.segment_attention(query.double(), key.double(), value.double(), *bounds)  # pyright: ignore
    rtol = 0 if dtype == torch.float32 else 2**-8  # results are rounded
    torch.testing.assert_close(got.double(), exact, atol=5e-6, rtol=rtol)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("group", "dims", "softcap", "with_sinks"),
    [(2, (128, 128), 50.0, False), (8, (64, 64), None, True), (1, (8, 8), 2.0, True)],
)
def test_capped_logits_and_sinks(dtype, group, dims, softcap, with_sinks):
    """Two rows of three heads, whose sinks differ; the cap bends the logits, some of which are near 0."""
    given = segments([1, 200, 63, 0, 64, 300], 2, group, dims, dtype)
    softmax = Softmax(softcap, torch.linspace(-4.0, 6.0, 3 * group).to(dtype) if with_sinks else None)
    got = attend(given, softmax)
    assert not got[1, 0].any(), "an empty segment gives zeros"
    query, key, value, *bounds = given
    exact = naive.segment_attention(query.double(), key.double(), value.double(), *bounds, softmax)  # pyright: ignore
    rtol = 0 if dtype == torch.float32 else 2**-8  # results are rounded
    torch.testing.assert_close(got.double(), exact, atol=5e-6, rtol=rtol)
    plain = naive.segment_attention(query.double(), key.double(), value.double(), *bounds)  # pyright: ignore
    assert (exact - plain).abs().max() > 1e-3, "the variant makes a difference"


@compiled
def test_capped_logits_of_any_size_and_what_is_not_a_number():
    query, value = torch.ones(1, 1, 1, 8), torch.randn(5, 8)
    key = torch.zeros(5, 8)
    key[:, 0] = torch.tensor([-1e30, -1e-6, 0.0, 1e-6, 1e30])
    given = query, key, value, torch.tensor([0]), torch.tensor([5]), 1.0
    expected = (3 * (key[:, 0].double() / 3).tanh()).softmax(0) @ value.double()
    torch.testing.assert_close(attend(given, Softmax(3.0)).view(8).double(), expected, atol=1e-6, rtol=0)
    key[2, 0] = torch.nan
    assert bool(attend(given, Softmax(3.0, torch.zeros(1))).isnan().all())


@compiled
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])
def test_logits_of_any_size_have_exact_weights(scale):
    """Rising logits move the running maximum in every block; far below it a weight is 0."""
    query, key, value = torch.full((1, 1, 1, 8), scale), torch.zeros(300, 8), torch.randn(300, 8)
    key[:, 0] = torch.linspace(-1, 1, 300)
    given = query, key, value, torch.tensor([0]), torch.tensor([300]), 1.0
    expected = (key.double() @ query.double().view(8)).softmax(0) @ value.double()
    got = attend(given).view(8)
    torch.testing.assert_close(got.double(), expected, atol=1e-6 + scale * 2e-7, rtol=0)  # logits are rounded


@compiled
def test_what_is_not_a_number_stays_so():
    given = segments([5, 9], 1, 2, (16, 16), torch.float32)
    given[1][2] = torch.nan
    got = attend(given)
    assert bool(got[0, 0].isnan().all()) and not got[0, 1].isnan().any()


def test_what_the_kernel_does_not_take(monkeypatch):
    query, key, value = segments([4], 1, 2, (16, 16), torch.float32)[:3]
    assert segment_attention.find_kernel(query.requires_grad_(), key, value) is None, "no gradient is recorded"
    query = query.detach()
    learning = Softmax(sinks=torch.zeros(2, requires_grad=True))
    assert segment_attention.find_kernel(query, key, value, learning) is None
    assert segment_attention.find_kernel(query.half(), key.half(), value.half()) is None
    assert segment_attention.find_kernel(query[..., :12], key[:, :12], value) is None
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    assert segment_attention.find_kernel(query, key, value) is None
    monkeypatch.setenv("TENURE_KERNELS", "fast")
    with pytest.raises(ValueError, match="TENURE_KERNELS is 'fast'; accepted: auto, triton, reference"):
        segment_attention.find_kernel(query, key, value)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "cc --no-such-flag"])
def test_without_a_compiler_there_is_no_kernel_and_the_log_says_why(monkeypatch, caplog, uncached, compiler):
    monkeypatch.setenv("CC", compiler)
    given = segments([4], 1, 2, (16, 16), torch.float32)
    with caplog.at_level("INFO"):
        assert segment_attention.find_kernel(*given[:3]) is None
    (record,) = caplog.records
    assert "segment_attention runs in plain torch" in record.message


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "scope", "kept"),
    [("llama", "global", 0.3), ("llama", "head", 0.3), ("llama", "global", 1.0), ("gpt_oss", "global", 0.3),
     ("gemma2", "global", 0.3)],
)  # fmt: skip
def test_decoding_is_that_of_torch(prompt, monkeypatch, dtype, name, scope, kept):
    settings = {"attn_logit_softcapping": 0.5} if name == "gemma2" else {}
    model = Architecture(name, settings).build().to(dtype)
    calls = []
    real = attention.segment_attention
    monkeypatch.setattr(attention, "segment_attention", lambda *given: calls.append(0) or real(*given))
    logits = []
    with torch.no_grad(), evict(model, "random", kept, scope, recent=4) as session:
        for kernels in ("auto", "reference"):
            monkeypatch.setenv("TENURE_KERNELS", kernels)
            cache = session.new_cache()
            session.extend(cache, prompt(2, 40))
            logits.append([session.extend(cache, prompt(2, 1, seed=seed)) for seed in range(3)])
            cache.check()
    assert len(calls) == 3 * len(cache.ragged)
    tolerance = 1e-5 if dtype == torch.float32 else 0.2  # rounded in every layer
    torch.testing.assert_close(logits[0], logits[1], atol=tolerance, rtol=tolerance)


def page_lists(layers: int, heads: int, size: int, lengths: list[int], tokens: int, pool: list[int]) -> PageLists:
    """A sequence on pages of `pool`: a compressed prompt with so many entries a segment, if any, and whole tokens."""

    def take(count: int) -> np.ndarray:
        return np.array([pool.pop() for _ in range(count)], np.int32)

    ragged = None
    if lengths:
        ragged = RaggedPages(take(sum(-(-n // size) for n in lengths)), np.array(lengths, np.int32), 100)
    sequence = PageLists(layers, heads, size, ragged)
    for _ in range(-(-(tokens + 1) // size)):
        sequence.add(take(layers * heads).reshape(-1, 1))
    sequence.tokens = tokens
    return sequence


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 8, 16])
@pytest.mark.parametrize("writes", [False, True])
def test_pages_are_read_where_they_are(dtype, size, writes):
    """Compressed prompts, empty heads, page ends and scattered pages; what is written is what is read."""
    layers, heads, group, dims = 2, 2, 3, (32, 16)
    generator = torch.Generator().manual_seed(size)
    pool = torch.randperm(1200, generator=generator).tolist()
    sequences = [
        page_lists(layers, heads, size, *given, pool)
        for given in (([], 0), ([], 70), ([5, 0, 130, 16], 0), ([64, 1, 3, 8], 15), ([], size - 1))
    ]
    # Entries that nobody holds are not read.
    key, value = (torch.full((1200 * size, dim), torch.nan, dtype=dtype) for dim in dims)
    for each in sequences:
        used = each.slots(0, each.tokens + (not writes)).ravel()
        if each.ragged is not None:
            bounds = each.ragged.bounds(size)
            for first, n in zip(bounds, each.ragged.lengths, strict=False):
                place = np.arange(n)
                held = each.ragged.pages[first + place // size] * size + place % size
                used = np.concatenate([used, held])
        for buffer in (key, value):
            buffer[used] = torch.randn(len(used), buffer.shape[1], generator=generator).to(dtype)
    rows = len(sequences)
    query = torch.randn(rows, heads, group, dims[0], generator=generator).to(dtype)
    keys, values = (torch.randn(rows, heads, dim, generator=generator).to(dtype) for dim in dims)
    new = (keys, values) if writes else None
    kernel = segment_attention.find_paged_kernel(query, key, value)
    assert kernel is not None
    pages = ListReads(kernel, {"key": key, "value": value}, sequences, 1)._pages
    for layer in range(layers):
        twins = key.double(), value.double()
        out, log_sums = query.new_full((rows, heads, group, dims[1]), torch.nan), torch.empty(rows, heads, group)
        exact, exact_sums = out.double(), log_sums.double()
        segment_attention.paged_attention(kernel, query, key, value, pages, layer, 0.3, out, log_sums, new)
        doubles = None if new is None else (new[0].double(), new[1].double())
        naive.paged_attention(query.double(), *twins, pages, layer, 0.3, exact, exact_sums, doubles)
        atol = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out.double(), exact, atol=atol, rtol=atol)
        torch.testing.assert_close(log_sums.double(), exact_sums, atol=1e-5, rtol=1e-5)
        assert torch.equal(key.double().nan_to_num(), twins[0].nan_to_num()), "the entries are written as they are"
        assert torch.equal(value.double().nan_to_num(), twins[1].nan_to_num())
