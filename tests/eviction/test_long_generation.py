"""Thousands of generated tokens under a budget: neither entries nor bytes grow."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import SnapKV, evict
from tenure.eviction.storage.segment_store import StorageConfig

BUDGET, BUFFER, TOKENS = 512, 128, 4096


@pytest.mark.parametrize(
    ("policy", "scope"),
    [("retention", "global"), (SnapKV(window=16), "head"), ("streaming_llm", "head")],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_4096_generated_tokens_stay_within_512_entries_a_head(tiny_model, gates_for, prompt, policy, scope):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    layers = 2 if scope == "global" else 1
    model = tiny_model("llama", num_hidden_layers=layers, max_position_embeddings=8192, **sizes)
    segments, most, held = 2 * layers, 0, []
    with evict(model, policy, BUDGET, scope, gates=gates_for(model), buffer=BUFFER) as session:
        cache = session.new_cache()
        token = model(prompt(1, 700), past_key_values=cache).logits[:, -1:].argmax(-1)
        assert cache.entries == BUDGET * segments
        entry = cache.stores[0].entry_bytes
        for _ in range(TOKENS):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            most = max(most, cache.entries)
            held.append(cache.nbytes)
        cache.check()
        report = session.report()
    assert cache.tokens_seen.tolist() == [700 + TOKENS]
    assert report.evictions == 1 + TOKENS // (BUFFER + 1), "as often as the buffer is full, and no more"
    assert most <= (BUDGET + BUFFER) * segments
    assert report.peak_entries == 700 * segments, "the prompt itself; counted before the eviction that ends a forward"
    assert max(held) <= (BUDGET + BUFFER) * (1 + StorageConfig.slack) * segments * entry
    late, early = max(held[-1000:]), max(held[:1000])
    assert late <= early * 1.01, "what is held is the same at the end as at the start"
