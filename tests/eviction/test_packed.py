"""A packed forward of sequences in pages gives each the logits that it has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenure.eviction import evict
from tenure.eviction.packed import PackedCache, PackedTokens, forward
from tenure.eviction.storage.page_reads import ReadsConfig
from tenure.retention import RetentionGates, UnsupportedModelError
from tenure.scripts.bench.tiny_models import Architecture
from tenure.serving.kvcache.page_pool import PagePool
from tenure.serving.kvcache.paged_sequence import PagedSequence
from tenure.serving.prompt_cache import Compression, PromptKV

# New tokens of each sequence in each forward; single tokens of an answer follow.
CHUNKS = ([16, 8, 16], [7], [1], [5, 28], [60, 30], [17])
FEW_CHUNKS = ([16, 4], [3], [1])  # for the kernels, which the interpreter takes seconds for


# Kernels, and the run of entries from which on the views read pages in place: all copied together, both, all in place.
# The page tables of the Triton kernels have one form.
FORMS = [(kernels, view) for kernels in ("auto", "reference") for view in (10_000, 32, 1)]
COMPRESSED_FORMS = [(kernels, view) for kernels in ("auto", "reference") for view in (10_000, 8)]


def pool_for(session, tokens: int) -> PagePool:
    """Pages of 16 for so many tokens: the interpreter copies the whole pool at every launch."""
    geometry = PromptKV(session).geometry
    assert geometry.page_size == 16
    return PagePool(geometry, -(-tokens // 16) * 16 * geometry.token_bytes, "cpu")


@pytest.mark.parametrize(("kernels", "view"), [*FORMS, ("triton", 1)])
@torch.no_grad()
def test_logits_are_those_of_each_sequence_alone(tiny_model, monkeypatch, kernels, view):
    model, rng = tiny_model("llama", num_hidden_layers=2), np.random.default_rng(0)
    all_chunks, turns = (CHUNKS, 9) if kernels == "reference" else (FEW_CHUNKS, 2)
    prompts = [rng.integers(3, 128, sum(chunks)) for chunks in all_chunks]
    with evict(model, "full") as session:
        pool = pool_for(session, 2000 if kernels == "reference" else 160)
        holes = None
        if view != 1:  # every third page is somebody else's
            whole = pool.allocate(pool.num_pages)
            holes = pool.share(whole.numbers[::3] if view > 32 else whole.numbers[::17])
            whole.release()
        sequences = [PagedSequence(pool) for _ in prompts]
        for turn in range(turns):
            new = []
            for i, (sequence, chunks) in enumerate(zip(sequences, all_chunks, strict=True)):
                size = chunks[turn] if turn < len(chunks) else 1
                if turn >= len(chunks):
                    prompts[i] = np.append(prompts[i], rng.integers(3, 128))
                sequence.reserve(sequence.end + size)
                new.append(PackedTokens(sequence, prompts[i][sequence.end : sequence.end + size]))
            monkeypatch.setenv("TENURE_KERNELS", kernels)
            cache = PackedCache(pool.buffers, pool.geometry.layers, new, config=ReadsConfig(view_entries=view))
            logits = forward(session.model, cache, range(len(new)))
            monkeypatch.setenv("TENURE_KERNELS", "reference")
            for sequence, prompt, got in zip(sequences, prompts, logits, strict=True):
                alone = session.extend(session.new_cache(), prompt[: sequence.end].tolist(), logits_to_keep=1)
                torch.testing.assert_close(got, alone[0, -1], rtol=1e-4, atol=1e-4)
        if holes is not None:
            holes.release()


@pytest.mark.parametrize("budget", [0.05, 0.5])
@pytest.mark.parametrize(("kernels", "view"), [*COMPRESSED_FORMS, ("triton", 8)])
@torch.no_grad()
def test_compressed_prompts_are_read_with_whole_tokens_behind_them(tiny_model, monkeypatch, kernels, budget, view):
    """Two requests share one compressed prompt, of which some heads keep nothing; a third has none."""
    model, rng = tiny_model("llama", num_hidden_layers=2), np.random.default_rng(1)
    torch.manual_seed(1)
    gates = RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)
    how = Compression("retention", budget, scope="global", sinks=0, recent=1)
    prompt = rng.integers(3, 128, 64 if kernels == "reference" else 48)
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        kv = PromptKV(session)
        pool = pool_for(session, 256)
        sequence = PagedSequence(pool)
        sequence.reserve(len(prompt))
        tokens = [PackedTokens(sequence, prompt)]
        forward(session.model, PackedCache(pool.buffers, pool.geometry.layers, tokens, gated=[0]), [])
        payload = kv.compress_pages(sequence, how)
        cache = session.new_cache()
        kv.forward(cache, prompt)
        kv.compress(cache, how)
        kept = [length for store in cache.stores for length in store.lengths]
        assert payload.lengths is not None and payload.lengths.tolist() == kept
        assert len(set(kept)) > 1 and (budget > 0.1 or min(kept) < 2)
        sequences = [PagedSequence(pool, [payload]), PagedSequence(pool, [payload]), PagedSequence(pool)]
        caches = [cache, cache.fork(), session.new_cache()]
        assert pool.num_pages - pool.num_free == payload.table.size, "sharing takes no pages"
        for size in (5, 1, 20, 1, 1) if kernels == "reference" else (3, 1):
            ids = [rng.integers(3, 128, size) for _ in sequences]
            for each in sequences:
                each.reserve(each.end + size)
            new = [PackedTokens(each, own) for each, own in zip(sequences, ids, strict=True)]
            monkeypatch.setenv("TENURE_KERNELS", kernels)
            config = ReadsConfig(view_entries=view)
            packed = PackedCache(pool.buffers, pool.geometry.layers, new, config=config)
            logits = forward(session.model, packed, range(3))
            monkeypatch.setenv("TENURE_KERNELS", "reference")
            for got, own, alone in zip(logits, ids, caches, strict=True):
                torch.testing.assert_close(got, kv.forward(alone, own), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forward_that_raises_leaves_the_sequences_as_they_were(tiny_model):
    model = tiny_model("llama", num_hidden_layers=2)
    with evict(model, "full") as session:
        pool = pool_for(session, 32)
        sequence = PagedSequence(pool)
        sequence.reserve(9)
        new = [PackedTokens(sequence, np.arange(3, 12))]
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(session.model, PackedCache(pool.buffers, pool.geometry.layers, new), [0])
        hook.remove()
        assert sequence.tokens == 0
        again = forward(session.model, PackedCache(pool.buffers, pool.geometry.layers, new), [0])
        torch.testing.assert_close(again[0], session.extend(session.new_cache(), list(range(3, 12)))[0, -1])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_another_softmax_is_refused(name):
    """Packed attention has no cap on logits and no sinks."""
    full = {"layer_types": ["full_attention"] * 4}
    model = Architecture(name, full).build()
    with evict(model, "full") as session:
        pool = pool_for(session, 160)
        sequence = PagedSequence(pool)
        sequence.reserve(9)
        cache = PackedCache(pool.buffers, pool.geometry.layers, [PackedTokens(sequence, np.arange(3, 12))])
        with pytest.raises(UnsupportedModelError, match="Attention is not supported in packed forwards: its softmax"):
            forward(model, cache, [0])
        assert sequence.tokens == 0
