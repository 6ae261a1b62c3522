"""Attention over the ragged store against plain attention with everything else masked."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tenure.eviction import evict
from tenure.eviction.forward_state import SequenceState
from tenure.eviction.storage.attention import ragged_attention
from tenure.eviction.storage.segment_store import SegmentStore
from tenure.retention.seams import Interceptor, intercept


class Masked(Interceptor):
    """Naive attention over a plain cache in which each (layer, row, head) sees only some of the old tokens."""

    def __init__(self, visible: dict[int, torch.Tensor]) -> None:
        self.visible = visible  # by layer: bool (batch, kv_heads, columns of the context)

    def begin(self, kwargs):
        self.mask = kwargs["attention_mask"]
        return kwargs

    def call(self, layer, hidden_states):
        def attend(base, module, query, key, value, attention_mask, **kwargs):
            batch, heads, total = key.shape[:3]
            q_len, group = query.shape[2], query.shape[1] // heads
            past = total - q_len
            allowed = torch.ones(batch, heads, q_len, total, dtype=torch.bool)
            allowed[..., :past] = self.visible[layer.layer_idx].unsqueeze(2)
            allowed[..., past:] = torch.ones(q_len, q_len, dtype=torch.bool).tril()
            allowed &= self.mask[:, None, None, :].bool()
            allowed = allowed.repeat_interleave(group, 1)
            logits = query @ key.repeat_interleave(group, 1).mT * kwargs["scaling"]
            weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
            return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

        return attend


@pytest.mark.parametrize("scope", ["global", "head"])
@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("padding", ["none", "left", "left and new"])
def test_kept_entries_attend_like_a_masked_full_cache(any_tiny_model, prompt, scope, new, padding):
    model, ids, more = any_tiny_model, prompt(2, 40), prompt(2, new, seed=5)
    mask = torch.ones(2, 40 + new, dtype=torch.long)
    if padding != "none":
        mask[1, :9] = 0
    if padding == "left and new":
        mask[0, 40 : 40 + (new + 1) // 2] = 0  # a shorter question; with one new token, none at all
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), evict(model, "random", 0.3, scope, recent=4) as session:
        cache = session.new_cache()
        context = {"attention_mask": mask[:, :40], "position_ids": positions[:, :40]}
        question = {"attention_mask": mask, "position_ids": positions[:, 40:]}
        model(ids, past_key_values=cache, **context)
        visible = {layer: torch.zeros(2, 2, 40, dtype=torch.bool) for layer in session.report().layer_indices}
        for layer, seen in visible.items():
            for row, heads in enumerate(cache.kept(layer)):
                real = mask[row, :40].nonzero().squeeze(1)
                for head, kept in enumerate(heads):
                    seen[row, head, real[kept]] = True
        got = model(more, past_key_values=cache, **question).logits
        cache.check()
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model(ids, past_key_values=plain, **context)
        with intercept(model, Masked(visible)):
            expected = model(more, past_key_values=plain, **question).logits
    real = mask[:, 40:].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_any_keep_set_attends_like_a_masked_full_cache(any_tiny_model, prompt, padding):
    """Heads that keep nothing, everything, and random halves; then forwards of several tokens and of one, in turn."""
    model, ids, sizes = any_tiny_model, prompt(2, 40), (5, 1, 1, 3, 1)
    mask = torch.ones(2, 40 + sum(sizes), dtype=torch.long)
    if padding == "left":
        mask[1, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    generator = torch.Generator().manual_seed(0)
    plain = DynamicCache(config=model.config)
    with evict(model, "full") as session:
        cache = session.new_cache()
        context = {"attention_mask": mask[:, :40], "position_ids": positions[:, :40]}
        model(ids, past_key_values=cache, **context)
        visible = {}
        for layer in cache.ragged:
            real = mask[:, None, :40].bool()
            keep = (torch.rand(2, 2, 40, generator=generator) < 0.5) & real
            keep[0, 0], keep[1, 1] = False, real[1, 0]
            visible[layer.layer_idx] = keep
            entries = torch.zeros(2, 2, 40, dtype=torch.bool)
            for row in range(2):
                entries[row, :, : int(real[row].sum())] = keep[row][:, real[row, 0]]
            cache.stores[len(visible) - 1].compact(entries)
        cache.rows.stored = cache._stored_entries()
        cache.rollback_points.evicted(40)
        cache.check()
        got, start = [], 40
        for size in sizes:
            new = {"attention_mask": mask[:, : start + size], "position_ids": positions[:, start : start + size]}
            got.append(model(prompt(2, size, seed=start), past_key_values=cache, **new).logits)
            start += size
        cache.check()
    model(ids, past_key_values=plain, **context)
    start = 40
    for size, logits in zip(sizes, got, strict=True):
        new = {"attention_mask": mask[:, : start + size], "position_ids": positions[:, start : start + size]}
        with intercept(model, Masked(visible)):
            expected = model(prompt(2, size, seed=start), past_key_values=plain, **new).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        seen = torch.ones(2, 2, size, dtype=torch.bool)
        visible = {layer: torch.cat([before, seen], dim=2) for layer, before in visible.items()}
        start += size


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 1, 9, 7]])
@pytest.mark.parametrize("q_len", [1, 3])
def test_value_dim_may_differ_and_nothing_is_read_outside_segments(lengths, q_len):
    torch.manual_seed(0)
    batch, heads, group, rows = 2, 2, 3, SequenceState()
    rows.tokens, rows.stored = [20, 20], [10, 10]
    rooms = [n + q_len + 2 for n in lengths]
    flat = {name: torch.full((sum(rooms), dim), torch.nan) for name, dim in (("key", 8), ("value", 4))}
    flat["position"] = torch.zeros(sum(rooms), dtype=torch.int32)
    store = SegmentStore(batch, heads, flat, lengths, rooms)
    for start, n in zip(store.starts, lengths, strict=True):
        store.key[start : start + n], store.value[start : start + n] = torch.randn(n, 8), torch.randn(n, 4)
    step = rows.new_step(batch, q_len, None, torch.device("cpu"), max(lengths), 0)
    key, value = torch.randn(batch, heads, q_len, 8), torch.randn(batch, heads, q_len, 4)
    store.append(key, value, {}, step)
    query = torch.randn(batch, heads * group, q_len, 8)
    out = ragged_attention(store, query, 0.3, step)
    assert out.shape == (batch, q_len, heads * group, 4)
    for row in range(batch):
        for head in range(heads * group):
            segment = row * heads + head // group
            n, start = lengths[segment], store.starts[segment]
            for i in range(q_len):
                keys = store.key[start : start + n + i + 1]
                weights = (keys @ query[row, head, i] * 0.3).softmax(0)
                torch.testing.assert_close(out[row, i, head], weights @ store.value[start : start + n + i + 1])
