"""KV in the device's pages: payloads, the copies in and out of them, and the sequences that share them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from tenure.retention.ops.kernel_choice import interpreting
from tenure.serving import DiskPool, MemoryPool, TensorPayload
from tenure.serving.kvcache.base import KVPayload, PromptKey
from tenure.serving.kvcache.memory_pool import Pool
from tenure.serving.kvcache.page_pool import PageBuilder, PageGeometry, PagePayload, PagePool, pages_for
from tenure.serving.kvcache.paged_sequence import PagedSequence

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if interpreting() else "cuda"
HEADS, DIM, PAGE = 2, 4, 4
ENTRY = (("key", torch.float32, DIM), ("value", torch.float32, DIM), ("log_beta", torch.float32, 0))
GEOMETRY = PageGeometry((0, 2), HEADS, ENTRY, PAGE)  # layer 1 of the decoder keeps nothing
LENGTHS = np.array([3, 8, 0, 5], np.int32)  # 1 + 2 + 0 + 2 pages


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TENURE_KERNELS", request.param)
    return request.param


@pytest.fixture
def pool() -> PagePool:
    """64 pages that contain NaN, as memory that was never written to may."""
    pool = PagePool(GEOMETRY, 64 * GEOMETRY.page_bytes, DEVICE)
    for buffer in pool.buffers.values():
        buffer.fill_(torch.nan)
    return pool


def plain(tokens: int, first: float = 0.0) -> TensorPayload:
    """KV of so many tokens, every number another one."""
    tensors, at = {}, first
    for layer in GEOMETRY.layers:
        for name, dtype, width in ENTRY:
            shape = (1, HEADS, tokens, max(1, width))
            count = int(np.prod(shape))
            tensors[f"layers.{layer}.{name}"] = torch.arange(at, at + count, dtype=dtype, device=DEVICE).view(shape)
            at += count
    return TensorPayload(tensors, tokens, token_dim=-2)


def compressed(tokens: int = 16) -> TensorPayload:
    """A prompt of which the heads keep `LENGTHS` entries, each head padded to whole pages."""
    tensors, at = {}, 0.0
    for place, layer in enumerate(GEOMETRY.layers):
        lengths = LENGTHS[place * HEADS : (place + 1) * HEADS]
        count = int((-(-lengths // PAGE) * PAGE).sum())
        tensors[f"layers.{layer}.lengths"] = torch.from_numpy(lengths.copy()).to(DEVICE)
        for name, dtype, width in ENTRY:
            size = count * max(1, width)
            tensors[f"layers.{layer}.{name}"] = torch.arange(at, at + size, dtype=dtype, device=DEVICE).view(count, -1)
            at += size
    return TensorPayload(tensors, tokens, token_dim=None)


def copied(payload: KVPayload, pool: Pool | PagePool, prompt: PromptKey | None = None) -> KVPayload:
    """A copy in `pool`, layer by layer as a transfer makes it."""
    builder = PageBuilder(pool, payload) if isinstance(pool, PagePool) else pool.new_builder(payload, prompt)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    return builder.commit()


def in_pages(pool: PagePool, payload: KVPayload) -> PagePayload:
    made = copied(payload, pool)
    assert isinstance(made, PagePayload)
    return made


def content(payload: KVPayload) -> dict[str, torch.Tensor]:
    return {name: one for layer in range(len(payload.layers)) for name, one in payload.read(layer).items()}


def assert_same(one: KVPayload, other: KVPayload) -> None:
    """The same kinds, and contents to the last bit."""
    assert (one.kinds(), one.tokens) == (other.kinds(), other.tokens)
    assert tuple(one.layers) == tuple(other.layers)
    first, second = content(one), content(other)
    assert first.keys() == second.keys() == set(one.kinds())
    for name, tensor in first.items():
        assert torch.equal(tensor.cpu(), second[name].cpu()), name


def test_geometry_counts_bytes():
    assert (GEOMETRY.segments, GEOMETRY.entry_bytes) == (4, 4 * (DIM + DIM + 1))
    assert GEOMETRY.token_bytes == 4 * GEOMETRY.entry_bytes and GEOMETRY.page_bytes == PAGE * GEOMETRY.entry_bytes
    with pytest.raises(ValueError, match="got 100 bytes for pages of 144; accepted: one page or more"):
        PagePool(GEOMETRY, 100, "cpu")


@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_a_payload_comes_back_from_every_tier(kernels, pool, tmp_path: Path, kind):
    """Device, host, disk and back into other pages, of which the first were taken by somebody else meanwhile."""
    source = plain(12) if kind == "plain" else compressed()
    first = in_pages(pool, source)
    assert pool.num_pages - pool.num_free == pages_for(source, GEOMETRY) == first.table.size
    assert first.nbytes == first.table.size * GEOMETRY.page_bytes and first.device == pool.device
    assert first.divisible == (kind == "plain") == (first.token_dim == -2)
    host = copied(first, MemoryPool(10**6, pinned=DEVICE == "cuda"))
    key = PromptKey(None, np.arange(first.tokens, dtype="<i4").tobytes(), ())
    disk = DiskPool(10**6, tmp_path)
    stored = copied(host, disk, key)
    first.held.release()
    taken = pool.allocate(7)
    again = in_pages(pool, stored)
    assert not np.array_equal(again.table, first.table), "they are other pages"
    assert_same(again, source)
    assert_same(host, source)
    taken.release()
    again.held.release()
    pool.check()
    assert pool.num_free == pool.num_pages
    disk.close()


def test_parts_share_the_pages_of_the_whole(kernels, pool):
    """Splitting and joining copy nothing, and the parts live without the whole."""
    source = plain(16)
    whole = in_pages(pool, source)
    used = pool.num_pages - pool.num_free
    first, rest = whole.split(4)
    middle, last = rest.split(4)
    assert pool.num_pages - pool.num_free == used
    assert (first.tokens, middle.tokens, last.tokens) == (4, 4, 8)
    whole.held.release()
    rest.held.release()
    joined = first.join(middle)
    assert joined is not None
    again = joined.join(last)
    assert again is not None and again.joins_freely
    for name, tensor in content(source).items():
        assert torch.equal(content(again)[name], tensor)
        if "layers.0" in name:
            assert torch.equal(content(middle)[name], tensor[:, :, 4:8])
    for each in (first, middle, last, joined):
        each.held.release()
    assert pool.num_pages - pool.num_free == used, "the joined one holds all of it"
    again.held.release()
    assert pool.num_free == pool.num_pages
    pool.check()


def test_what_does_not_join(pool):
    one, other = in_pages(pool, plain(4)), in_pages(PagePool(GEOMETRY, 10**5, DEVICE), plain(4))
    whole = in_pages(pool, compressed())
    assert one.join(other) is None and one.join(plain(4)) is None
    assert one.join(whole) is None and whole.join(one) is None
    for at in (0, 3, 4):
        with pytest.raises(AssertionError, match="only divisible payloads, between pages"):
            one.split(at)
    with pytest.raises(AssertionError, match="only divisible payloads, between pages"):
        whole.split(4)


def test_payloads_of_another_model_are_refused(pool):
    """By name, before any page is taken."""
    missing = TensorPayload({k: v for k, v in plain(8).tensors.items() if k != "layers.2.log_beta"}, 8)
    other = plain(8)
    other.tensors["layers.0.value"] = other.tensors["layers.0.value"].half()  # pyright: ignore[reportIndexIssue]
    wide = compressed()
    wide.tensors["layers.2.key"] = wide.tensors["layers.2.key"][:5]  # pyright: ignore[reportIndexIssue]
    for payload, message in (
        (missing, r"got a payload that differs from the engine's pages in layers\.2\.log_beta"),
        (other, r"got layers\.0\.value \(1, 2, 8, 4\) of torch\.float16; accepted: \(1, 2, 8, 4\) of torch\.float32"),
        (plain(6), r"got layers\.0\.key \(1, 2, 6, 4\) of torch\.float32; accepted: .*, whole pages of 4"),
        (wide, r"got layers\.2\.key \(5, 4\) of torch\.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            PageBuilder(pool, payload)
    assert pool.num_free == pool.num_pages


def test_a_compressed_prompt_padded_for_other_pages_is_refused(pool):
    """Of the same number of pages in all, so that its heads would be read from one another's pages."""
    wrong = compressed()
    lengths = torch.tensor([3, 4], dtype=torch.int32)  # 1 + 1 pages; there are 3
    wrong.tensors["layers.0.lengths"] = lengths  # pyright: ignore[reportIndexIssue]
    with pytest.raises(
        ValueError, match="got a compressed prompt of 5 pages whose heads fill 4; accepted: pages of 4 e"
    ):
        in_pages(pool, wrong)
    gc.collect()
    assert pool.num_free == pool.num_pages


def test_a_copy_that_is_given_up_frees_its_pages(pool):
    builder = PageBuilder(pool, plain(8))
    builder.write(0, plain(8).read(0))
    assert pool.num_free < pool.num_pages
    builder.abort()
    assert pool.num_free == pool.num_pages
    with pytest.raises(MemoryError, match="68 pages are asked for, 64 are free"):
        PageBuilder(pool, plain(68))


def test_pages_are_free_when_the_last_reference_ends(pool):
    held = pool.allocate(8)
    assert held.numbers.tolist() == list(range(8)) and not held.numbers.flags.writeable
    shared = pool.share(held.numbers[::2])
    held.release()
    held.release()  # the second time it has no effect
    assert pool.num_free == 60
    again = pool.allocate(62 - 2)
    assert set(again.numbers.tolist()).isdisjoint(shared.numbers.tolist())
    with pytest.raises(MemoryError, match="1 pages are asked for, 0 are free"):
        pool.allocate(1)
    del shared
    gc.collect()
    assert pool.num_free == 4, "an object that is gone holds nothing"
    again.release()
    pool.check()


def test_a_sequence_grows_by_pages_of_zeros(pool):
    """A masked entry must be finite, so new pages are cleared."""
    sequence = PagedSequence(pool)
    for end, pages in ((1, 1), (4, 1), (5, 2), (13, 4), (3, 4)):
        sequence.reserve(end)
        assert sequence.table.shape == (4, pages)
    numbers = sequence.table.ravel()
    assert all((one == 0).all() for one in pool.read(numbers).values())
    assert pool.num_pages - pool.num_free == 16
    before = sequence.table.copy()
    with pytest.raises(MemoryError):
        sequence.reserve(65 * PAGE)
    assert np.array_equal(sequence.table, before), "it is as it was"
    sequence.release()
    assert pool.num_free == pool.num_pages


def test_a_sequence_begins_with_a_cached_prefix(kernels, pool):
    """Of two plain payloads, or of a compressed and a plain one; positions count the tokens that they stand for."""
    first, second, head = in_pages(pool, plain(8)), in_pages(pool, plain(4, 1000.0)), in_pages(pool, compressed())
    used = pool.num_pages - pool.num_free
    whole, behind = PagedSequence(pool, [first, second]), PagedSequence(pool, [head, second])
    assert pool.num_pages - pool.num_free == used, "sharing takes no pages"
    assert (whole.start, whole.tokens, whole.end) == (0, 12, 12)
    assert (behind.start, behind.tokens, behind.end) == (16, 4, 20)
    assert behind.ragged is not None and behind.ragged.lengths.tolist() == LENGTHS.tolist()
    assert_same(whole.span(8, 12), second)
    assert_same(behind.span(16, 20), second)
    for each in (first, second, head):
        each.held.release()
    assert pool.num_pages - pool.num_free == used, "the sequences hold them"
    for sequence in (whole, behind):
        with pytest.raises(ValueError, match="got payloads that do not follow each other; accepted: "):
            PagedSequence(pool, [second, head])
        sequence.release()
    assert pool.num_free == pool.num_pages
    with pytest.raises(ValueError, match="got payloads that do not follow each other"):
        PagedSequence(pool, [plain(4)])


def test_a_span_outside_the_whole_tokens_is_refused(pool):
    """The tokens of a compressed prompt have no pages of their own."""
    behind = PagedSequence(pool, [in_pages(pool, compressed()), in_pages(pool, plain(8))])
    for start, stop in ((0, 24), (8, 20), (16, 28), (17, 20), (20, 16)):
        with pytest.raises(
            ValueError, match=rf"got the span \[{start}, {stop}\); accepted: whole pages within \[16, 24\)"
        ):
            behind.span(start, stop)


def test_what_another_request_has_stored_takes_the_place_of_its_own(kernels, pool):
    """Its own copies of the stored pages are free then; those behind them stay."""
    stored = in_pages(pool, plain(8))
    own = PagedSequence(pool, [in_pages(pool, plain(8)), in_pages(pool, plain(4, 500.0))])
    gc.collect()
    wanted = content(own.span(0, 12))
    used = pool.num_pages - pool.num_free
    own.share_stored([stored])
    assert used - (pool.num_pages - pool.num_free) == 8 and own.tokens == 12
    assert np.array_equal(own.table[:, :2], stored.table)
    for name, tensor in content(own.span(0, 12)).items():
        assert torch.equal(tensor, wanted[name]), name
    used = pool.num_free
    own.share_stored([stored])
    assert pool.num_free == used, "it uses them already"
    own.reserve(16)
    assert own.table.shape[1] == 4


def test_a_stored_compressed_prompt_takes_the_place_of_its_own(pool):
    stored = in_pages(pool, compressed())
    own = PagedSequence(pool, [in_pages(pool, compressed())])
    own.reserve(20)
    own.tokens = 3
    gc.collect()
    used = pool.num_pages - pool.num_free
    own.share_stored([stored])
    assert used - (pool.num_pages - pool.num_free) == 5
    assert (
        own.ragged is not None and np.array_equal(own.ragged.pages, stored.table) and (own.tokens, own.end) == (3, 19)
    )
    stored.held.release()
    own.release()
    assert pool.num_free == pool.num_pages
