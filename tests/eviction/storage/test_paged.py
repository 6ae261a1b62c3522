"""The store in pages: the contiguous one's state machine, and whole generations through the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tenure.eviction import Defensive, RetentionDefensive, evict
from tenure.eviction.forward_state import SequenceState
from tenure.eviction.storage.paged_store import PAGE, PagedStore, pages_of, store_class
from tenure.eviction.storage.segment_store import SegmentStore, StorageConfig

from ...launches import running
from ..remembered import assert_same
from .test_segments import HEADS, StoreMachine

__all__ = ["running"]
SCORING = {"sum_rows", "finish_rows", "take_worst", "project_norms"}
DECODING = {"attend_piece", "merge_pieces", "plan_append", "write_new", "write_numbers"}
EVICTING = {"move_kept", "plan_release", "push_free", "count_digits", "pick_digit", "mark"}


class PagedMachine(StoreMachine):
    """Forks, rollbacks, beams and evictions through the kernels' twins, which the kernels equal to the page."""

    store = PagedStore


PagedMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestPaged = PagedMachine.TestCase


def filled(n: int) -> tuple[PagedStore, SequenceState]:
    rows = SequenceState()
    step = rows.new_step(1, n, None, torch.device("cpu"), 0, 0)
    key = torch.arange(float(HEADS * n)).view(1, HEADS, n, 1).expand(-1, -1, -1, 4)
    rows.advance(step, HEADS)
    return PagedStore.from_dense(key, -key, {}, step), rows


def test_an_eviction_frees_pages_for_other_heads_and_gives_the_rest_back():
    store, rows = filled(400)
    keep = torch.zeros(1, HEADS, 400, dtype=torch.bool)
    keep[0, 0, ::2], keep[0, 1, 7] = True, True
    store.compact(keep)
    store.check()
    owned = sum(map(pages_of, (200, 1)))
    assert store.lengths == [200, 1] and store.num_pages - store.free_pages == owned
    assert store.nbytes <= (owned + max(HEADS, StorageConfig.slack * owned)) * PAGE * store.entry_bytes
    assert store.nbytes <= (store.entries * (1 + StorageConfig.slack) + store.spare * HEADS) * store.entry_bytes
    step = rows.new_step(1, 15, None, torch.device("cpu"), 0, 0)
    before = store.key.data_ptr()
    store.append(torch.ones(1, HEADS, 15, 4), torch.ones(1, HEADS, 15, 4), {}, step)
    store.check()
    assert store.key.data_ptr() == before, "the second head filled its page, the first took a free one"


def test_appending_is_amortised():
    store, rows = filled(1000)
    layouts = set()
    for _ in range(300):
        step = rows.new_step(1, 1, None, torch.device("cpu"), 0, 0)
        store.append(torch.ones(1, HEADS, 1, 4), torch.ones(1, HEADS, 1, 4), {}, step)
        rows.advance(step, HEADS)
        layouts.add(store.num_pages)
    store.check()
    assert len(layouts) <= 6


@pytest.mark.parametrize(
    ("kernels", "dtype", "dim", "kind"),
    [
        ("reference", torch.float32, 8, SegmentStore),
        ("auto", torch.float32, 8, SegmentStore),
        ("triton", torch.bfloat16, 128, PagedStore),
        ("triton", torch.float64, 8, SegmentStore),
        ("triton", torch.float32, 512, SegmentStore),
    ],
)
def test_the_store_follows_the_choice_of_kernels(kernels, dtype, dim, kind, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    assert store_class(torch.device("cpu"), dtype, dim, dim) is kind


@torch.no_grad()
def generated(model, ids, mask, policy, gates, scope):
    with evict(model, policy, 0.5, scope, gates, sinks=1, recent=2, buffer=1) as session:
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        cache = session.last_cache
        assert cache.report().evictions >= 2, "the prompt's and one in decoding"
        return tokens, cache


@pytest.mark.parametrize(
    ("policy", "scope", "layers", "rows"),
    [(RetentionDefensive(window=4, mass=0.5), "global", 2, 1), (Defensive(window=4), "head", 1, 2)],
    ids=["global", "padded"],
)
def test_generation_with_kernels_equals_generation_without(
    policy, scope, layers, rows, tiny_model, gates_for, prompt, running, monkeypatch
):
    """Through `evict`: paged store, decode attention, append, compaction, selection and scoring, all by Triton."""
    monkeypatch.setattr("tenure.eviction.ops.paged_attention.PROGRAMS", 1)  # each costs the interpreter milliseconds
    model = tiny_model("llama", num_hidden_layers=layers)
    ids, mask = prompt(rows, 20), torch.ones(rows, 20, dtype=torch.long)
    mask[1:, :7] = 0
    gates = gates_for(model) if "log_beta" in policy.needs else None
    results = {}
    for kernels, kind in (("reference", SegmentStore), ("triton", PagedStore)):
        monkeypatch.setenv("TENURE_KERNELS", kernels)
        results[kernels] = generated(model, ids, mask, policy, gates, scope)
        assert set(running) >= SCORING | DECODING | EVICTING if kernels == "triton" else not running
        assert all(type(store) is kind for store in results[kernels][1].stores)
    monkeypatch.setenv("TENURE_KERNELS", "reference")  # only to read what is stored
    assert torch.equal(results["triton"][0], results["reference"][0])
    assert_same(results["triton"][1], results["reference"][1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_goes_on_in_the_other_store(tiny_model, prompt, tmp_path, monkeypatch):
    """Saved by one and loaded by the other, then forked, extended by a padded question and taken back."""
    model, file = tiny_model("llama", num_hidden_layers=1), tmp_path / "context.safetensors"
    caches = {}
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 30] = 0
    for writer, reader in (("triton", "reference"), ("reference", "triton")):
        with evict(model, "knorm", 0.5, sinks=1, recent=2, buffer=40) as session:
            monkeypatch.setenv("TENURE_KERNELS", writer)
            cache = session.new_cache()
            model(prompt(2, 30), past_key_values=cache)
            cache.save(file)
            monkeypatch.setenv("TENURE_KERNELS", reader)
            loaded = session.load_cache(file)
            fork = loaded.fork()
            logits = model(prompt(2, 3, seed=1), attention_mask=mask, past_key_values=loaded).logits
            assert_same(fork, cache)
            caches[reader] = loaded, logits[:, 1:]
            gone = loaded.fork()
            gone.crop(-3)
            assert_same(gone, cache)
    (one, first), (other, second) = caches["triton"], caches["reference"]
    assert type(one.stores[0]) is PagedStore and type(other.stores[0]) is SegmentStore
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    assert_same(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
